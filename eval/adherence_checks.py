"""Direction and colour of a clip's moving thing without a network, to check the judge.

Both look at what differs from the clip's median frame. They hold for one kind of thing that
crosses the picture; a moving camera makes them less sure, which their accuracy on renders shows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vdit_sparse.eval.judge import unit_range
from vdit_sparse.pipelines.mini.training.captions import Spec
from vdit_sparse.pipelines.mini.training.judge_labels import DIRECTIONS, NOTHING, Score
from vdit_sparse.pipelines.mini.training.palette import rgb_to_hsv
from vdit_sparse.pipelines.mini.training.vocabulary import COLOURS

_HEIGHT = 64
# Sums over three channels in [0, 1]: what differs less is the background's own movement.
_MOVED, _SURE = 0.15, 0.4
_LEAST_WAY = 0.05
_BINS, _HUE_WIDTH = 72, 12.0


def crosses(spec: Spec) -> bool:
    """Whether the checks apply: one kind of thing, moving left, right, up or down."""
    return len(spec.items) == 1 and spec.items[0].motion in DIRECTIONS


def direction(video: Tensor) -> str:
    """Which way the moving thing goes: "left", "right", "up" or "down", or "none" if it stays
    within a twentieth of the picture's height or nothing differs from the median frame.

    The centroid of each frame's difference from the median frame, squared after smoothing over 5
    pixels, is fitted by a line over time; the longer side of its slope decides.

    video: uint8 `[T, 3, H, W]` or float in [0, 1].
    """
    clip = _small(video)
    weight = (_difference(clip) - _MOVED).clamp(min=0)
    weight = F.avg_pool2d(weight[None], 5, 1, 2)[0].square()
    right, down = _way(weight)
    if max(abs(right), abs(down)) < _LEAST_WAY:
        return NOTHING
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "down" if down > 0 else "up"


def colour(video: Tensor) -> str:
    """The named colour nearest to the hue of what moves; "none" if nothing coloured does.

    A histogram of hues (5 degrees a bin, weighted by saturation, value and difference from the
    median frame), less that of the median frame at the same pixels, so that shadows cancel; each
    name collects what lies near its hue (a Gaussian of 12 degrees).

    video: uint8 `[T, 3, H, W]` or float in [0, 1].
    """
    clip = _small(video)
    weight = F.avg_pool2d(_difference(clip)[None], 3, 1, 1)[0]
    weight = (weight - _SURE).clamp(min=0)
    still = clip.median(0, keepdim=True).values.expand_as(clip)
    found = (_hues(clip, weight) - _hues(still, weight)).clamp(min=0)
    centres = (torch.arange(_BINS) + 0.5) * (360 / _BINS)
    names = torch.tensor([float(hue) for hue in COLOURS.values()])
    apart = ((centres[:, None] - names + 180) % 360 - 180).abs()
    near = found @ torch.exp(-((apart / _HUE_WIDTH) ** 2))
    return tuple(COLOURS)[int(near.argmax())] if near.max() > 0 else NOTHING


CHECKS = {
    "direction by centroid": (direction, lambda spec: spec.items[0].motion),
    "colour by hue": (colour, lambda spec: spec.items[0].colour),
}
"""Row of a report -> the check, and what it ought to say of a `Spec` that `crosses`."""


def check(video: Tensor, spec: Spec) -> dict[str, Score]:
    """Row -> whether the clip shows its `spec`; nothing is asked where a check does not apply."""
    if not crosses(spec):
        return dict.fromkeys(CHECKS, Score())
    return {
        row: Score(look(video) == truth(spec), 1) if truth(spec) else Score()
        for row, (look, truth) in CHECKS.items()
    }


def _small(video: Tensor) -> Tensor:
    """On the CPU, 64 pixels high, float32 in [0, 1]."""
    # torch 2.13 returns wrong medians of expanded tensors (stride 0) on the CPU.
    clip = unit_range(video).cpu().contiguous()
    height, width = clip.shape[-2:]
    if height <= _HEIGHT:
        return clip
    size = (_HEIGHT, max(1, round(width * _HEIGHT / height)))
    return F.interpolate(clip, size, mode="bilinear", antialias=True).clamp(0, 1)


def _difference(clip: Tensor) -> Tensor:
    """From the median frame, summed over channels, `[T, H, W]`."""
    return (clip - clip.median(0, keepdim=True).values).abs().sum(1)


def _way(weight: Tensor) -> tuple[float, float]:
    """How far the centroid of `[T, H, W]` goes over the clip, right and down, in picture heights.

    Frames count by how much stands out in them, at most as much as in the median frame.
    """
    frames, height, width = weight.shape
    mass = weight.sum((1, 2))
    if not mass.any():
        return 0.0, 0.0
    share = mass.clamp(max=float(mass[mass > 0].median()))
    share = share / share.sum()
    moment = torch.linspace(-0.5, 0.5, frames)
    moment = moment - (share * moment).sum()
    spread = (share * moment.square()).sum()
    if spread == 0:
        return 0.0, 0.0
    across = (weight.sum(1) @ torch.arange(width).float()) / mass.clamp(min=1e-9)
    along = (weight.sum(2) @ torch.arange(height).float()) / mass.clamp(min=1e-9)
    right, down = ((share * moment * each).sum() / spread / height for each in (across, along))
    return float(right), float(down)


def _hues(clip: Tensor, weight: Tensor) -> Tensor:
    """The weighted histogram of hues, `[72]`."""
    hue, saturation, value = rgb_to_hsv(clip.movedim(1, -1))
    bins = (hue * (_BINS / 360)).long().clamp(max=_BINS - 1)
    return torch.bincount(bins.flatten(), (weight * saturation * value).flatten(), _BINS)
