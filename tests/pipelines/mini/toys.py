"""What the two files of training tests share."""

import torch

from vdit_sparse.pipelines.mini.training.clips import ClipShape

SHAPE = ClipShape(32, 64, 5, "cpu")


def randomise(module, std=0.1):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return module


def published_st_lpips(path):
    """Writes random numbers under the names and shapes of ST-LPIPS' published AlexNet file."""
    generator = torch.Generator().manual_seed(0)
    layers = (("1.0", 3, 64, 11), ("2.5", 64, 192, 5), ("3.9", 192, 384, 3))
    layers += (("4.11", 384, 256, 3), ("5.13", 256, 256, 3))
    state = {"net.slice1.1.filt": torch.zeros(64, 1, 3, 3)}
    state["scaling_layer.shift"] = torch.tensor([-0.03, -0.09, -0.19]).view(1, 3, 1, 1)
    state["scaling_layer.scale"] = torch.tensor([0.46, 0.45, 0.45]).view(1, 3, 1, 1)
    for index, (name, inputs, outputs, side) in enumerate(layers):
        weight = torch.randn(outputs, inputs, side, side, generator=generator)
        state[f"net.slice{name}.weight"] = weight * (2 / (inputs * side**2)) ** 0.5
        state[f"net.slice{name}.bias"] = torch.full((outputs,), 0.01)
        state[f"lin{index}.model.1.weight"] = torch.rand(1, outputs, 1, 1, generator=generator)
    torch.save(state, path)
