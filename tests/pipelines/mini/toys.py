"""What the two files of training tests share."""

import torch

from vdit_sparse.pipelines.mini.training.clips import ClipShape

SHAPE = ClipShape(32, 64, 5, "cpu")


def randomise(module, std=0.1):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return module
