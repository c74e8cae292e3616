"""LPIPS of a video against its reference, where the weights of its trunk are on this machine."""

from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vdit_sparse.eval.frames import levels
from vdit_sparse.eval.metrics.parts.batches import over_frames, unit
from vdit_sparse.eval.metrics.parts.colour import rgb
from vdit_sparse.eval.metrics.parts.sources import EVAL_EXTRA, missing, package_file

# Trunk -> torchvision's file of it; the layers of `features`: (index, stride, padding, pool size
# before it or 0, whether its output after ReLU is compared).
TRUNKS = {
    "alex": (
        "alexnet-owt-7be5be79.pth",
        (
            (0, 4, 2, 0, True),
            (3, 1, 2, 3, True),
            (6, 1, 1, 3, True),
            (8, 1, 1, 0, True),
            (10, 1, 1, 0, True),
        ),
    ),
    "vgg": (
        "vgg16-397923af.pth",
        (
            (0, 1, 1, 0, False),
            (2, 1, 1, 0, True),
            (5, 1, 1, 2, False),
            (7, 1, 1, 0, True),
            (10, 1, 1, 2, False),
            (12, 1, 1, 0, False),
            (14, 1, 1, 0, True),
            (17, 1, 1, 2, False),
            (19, 1, 1, 0, False),
            (21, 1, 1, 0, True),
            (24, 1, 1, 2, False),
            (26, 1, 1, 0, False),
            (28, 1, 1, 0, True),
        ),
    ),
}
SMALLEST = 32
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def lpips_per_frame(video: Tensor, reference: Tensor, trunk: str = "alex") -> Tensor:
    """LPIPS of each frame, 0 for equal ones: float64 `[T]`.

    Zhang et al., CVPR 2018, arXiv 1801.03924, version 0.1. Papers differ in the trunk (Sparse
    VideoGen's figures are VGG's): always name it.

    The heads come with torchmetrics; the trunk is torchvision's ImageNet network in PyTorch's own
    cache of weights, and is never downloaded (`unavailable` says where it is looked for). The
    package torchvision is not needed.

    trunk: "alex" or "vgg".
    video, reference: RGB `[T, 3, H, W]`, uint8, or float in [0, 1], sides of at least 32 pixels;
    ValueError if they differ in shape or are no such videos.
    """
    pair = rgb(levels(video, reference)), rgb(levels(reference, video))
    if min(video.shape[-2:]) < SMALLEST:
        raise ValueError(
            f"LPIPS needs frames of at least {SMALLEST} x {SMALLEST} pixels, got "
            f"{video.shape[-2]} x {video.shape[-1]}."
        )
    weights = _weights(trunk_file(trunk), _heads_file(trunk), video.device)
    return over_frames(partial(distance, weights, trunk), *pair).double()


def distance(weights: dict[str, Tensor], trunk: str, one: Tensor, other: Tensor) -> Tensor:
    """LPIPS of 8-bit frames `[T, 3, H, W]` by the weights of a trunk and its heads: `[T]`."""
    total = torch.zeros(len(one), device=one.device)
    pairs = zip(_features(weights, trunk, one), _features(weights, trunk, other), strict=True)
    for layer, (first, second) in enumerate(pairs):
        difference = (_normalised(first) - _normalised(second)).square()
        head = weights[f"lin{layer}.model.1.weight"].view(-1, 1, 1)
        total = total + (head * difference).sum(1).mean((1, 2))
    return total


def unavailable(trunk: str) -> str | None:
    if reason := missing(_heads_file(trunk), "torchmetrics", EVAL_EXTRA):
        return reason
    file = trunk_file(trunk)
    if file.is_file():
        return None
    return f"there are no weights of its trunk: put torchvision's {file.name} into {file.parent}."


def trunk_file(trunk: str) -> Path:
    """Where torchvision would have left the trunk's weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / TRUNKS[trunk][0]


def _heads_file(trunk: str) -> Path | None:
    return package_file("torchmetrics", f"functional/image/lpips_models/{trunk}.pth")


@cache
def _weights(trunk: Path, heads: Path, device: torch.device) -> dict[str, Tensor]:
    parts = (torch.load(file, map_location=device, weights_only=True) for file in (trunk, heads))
    needed = ("features.", "lin")
    return {name: x for part in parts for name, x in part.items() if name.startswith(needed)}


def _features(weights: dict[str, Tensor], trunk: str, frames: Tensor) -> list[Tensor]:
    column = {"device": frames.device, "dtype": torch.float32}
    shift, scale = (torch.tensor(x, **column).view(3, 1, 1) for x in (_SHIFT, _SCALE))
    hidden, found = (unit(frames) * 2 - 1 - shift) / scale, []
    for index, stride, padding, pool, compared in TRUNKS[trunk][1]:
        if pool:
            hidden = F.max_pool2d(hidden, pool, 2)
        kernel, bias = (weights[f"features.{index}.{kind}"] for kind in ("weight", "bias"))
        hidden = F.relu(F.conv2d(hidden, kernel, bias, stride=stride, padding=padding))
        if compared:
            found.append(hidden)
    return found


def _normalised(features: Tensor) -> Tensor:
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)
