"""FLIP of a video against its reference: the difference seen when alternating between the two.

Andersson et al., "FLIP: a difference evaluator for alternating images", 2020
(doi.org/10.1145/3406183), the variant for low dynamic range, at 67 pixels per degree of visual
angle: a 0.7 m wide monitor of 3840 pixels seen from 0.7 m. Frames are compared one by one.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vdit_sparse.eval.frames import levels
from vdit_sparse.eval.metrics.parts.batches import over_frames, unit
from vdit_sparse.eval.metrics.parts.colour import rgb

PIXELS_PER_DEGREE = 67.0

# Linear sRGB -> XYZ (D65), and the white that (1, 1, 1) becomes.
_TO_XYZ = torch.tensor(
    [
        [10135552 / 24577794, 8788810 / 24577794, 4435075 / 24577794],
        [2613072 / 12288897, 8788810 / 12288897, 887015 / 12288897],
        [1425312 / 73733382, 8788810 / 73733382, 70074185 / 73733382],
    ],
    dtype=torch.float64,
)
# Contrast sensitivity: (amplitude, width) of the Gaussians, of luminance, red-green, blue-yellow.
_SENSITIVITY = (((1.0, 0.0047),), ((1.0, 0.0053),), ((34.1, 0.04), (13.5, 0.025)))
_WIDEST = 0.04
_COLOUR_POWER, _COLOUR_KNEE, _COLOUR_AT_KNEE = 0.7, 0.4, 0.95
_FEATURE_WIDTH, _FEATURE_POWER = 0.082, 0.5


def flip_per_frame(video: Tensor, reference: Tensor) -> Tensor:
    """Mean over pixels of FLIP of each frame, 0 (equal) to 1: float64 `[T]`.

    Computed in float32, within 1e-4 of NVIDIA's flip-evaluator.

    video, reference: RGB `[T, 3, H, W]`, uint8, or float in [0, 1]; ValueError if they differ in
    shape or are no such videos.
    """
    pair = rgb(levels(video, reference)), rgb(levels(reference, video))
    return over_frames(_of_frames, *pair).double()


def _of_frames(test: Tensor, reference: Tensor) -> Tensor:
    opponents = [_opponents(_linear(unit(frames))) for frames in (test, reference)]
    colour = _colour_difference(*(_seen(each) for each in opponents))
    feature = _feature_difference(*((each[:, :1] + 16) / 116 for each in opponents))
    return (colour ** (1 - feature)).flatten(1).mean(1)


def _colour_difference(test: Tensor, reference: Tensor) -> Tensor:
    """HyAB distances of Hunt-adjusted Lab, spread over [0, 1]: `[T, H, W]`."""
    corners = _linear(test.new_tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])).view(2, 3, 1, 1)
    green, blue = _hunt_lab(corners).split(1)
    largest = _hyab(green, blue) ** _COLOUR_POWER
    difference = _hyab(_hunt_lab(test), _hunt_lab(reference)) ** _COLOUR_POWER
    knee = _COLOUR_KNEE * largest
    above = (difference - knee) / (largest - knee) * (1 - _COLOUR_AT_KNEE) + _COLOUR_AT_KNEE
    return torch.where(difference < knee, difference * (_COLOUR_AT_KNEE / knee), above)


def _feature_difference(test: Tensor, reference: Tensor) -> Tensor:
    """The larger of the differences of edges and of points: `[T, H, W]`."""
    deviation = 0.5 * _FEATURE_WIDTH * PIXELS_PER_DEGREE
    place = torch.arange(-math.ceil(3 * deviation), math.ceil(3 * deviation) + 1).double()
    bell = torch.exp(-(place**2) / (2 * deviation**2))
    differences = []
    for taps in (-place * bell, (place**2 / deviation**2 - 1) * bell):
        # Positive taps sum to 1 and negative ones to -1, as outer products with the bell too.
        taps = torch.where(
            taps > 0, taps / taps.clamp(min=0).sum(), taps / -taps.clamp(max=0).sum()
        )
        sizes = [
            torch.hypot(
                _filtered(x, taps, bell / bell.sum()), _filtered(x, bell / bell.sum(), taps)
            )
            for x in (test, reference)
        ]
        differences.append((sizes[0] - sizes[1]).abs())
    return (torch.maximum(*differences)[:, 0] / math.sqrt(2)) ** _FEATURE_POWER


def _seen(opponents: Tensor) -> Tensor:
    """What the eye resolves of it, as linear RGB in [0, 1]."""
    radius = math.ceil(3 * math.sqrt(_WIDEST / (2 * math.pi**2)) * PIXELS_PER_DEGREE)
    place = torch.arange(-radius, radius + 1).double() / PIXELS_PER_DEGREE
    channels = []
    for channel, gaussians in zip(opponents.split(1, 1), _SENSITIVITY, strict=True):
        bells = [torch.exp(-(math.pi**2) * place**2 / width) for _, width in gaussians]
        # The share of each Gaussian in the whole two-dimensional kernel.
        weights = [
            amplitude * math.sqrt(math.pi / width) * float(bell.sum()) ** 2
            for (amplitude, width), bell in zip(gaussians, bells, strict=True)
        ]
        channels.append(
            sum(
                _filtered(channel, bell / bell.sum(), bell / bell.sum()) * (weight / sum(weights))
                for bell, weight in zip(bells, weights, strict=True)
            )
        )
    return _from_opponents(torch.cat(channels, 1)).clamp(0, 1)


def _filtered(x: Tensor, across: Tensor, along: Tensor) -> Tensor:
    """One channel `[T, 1, H, W]` through a separable filter, borders repeated."""
    reach = len(across) // 2
    x = F.pad(x, (reach, reach, reach, reach), mode="replicate")
    x = F.conv2d(x, across.to(x).view(1, 1, 1, -1))
    return F.conv2d(x, along.to(x).view(1, 1, -1, 1))


def _linear(srgb: Tensor) -> Tensor:
    return torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def _mixed(matrix: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("oc,tchw->tohw", matrix.to(x), x)


def _relative_xyz(linear: Tensor) -> Tensor:
    """XYZ over that of white."""
    return _mixed(_TO_XYZ / _TO_XYZ.sum(1, keepdim=True), linear)


def _opponents(linear: Tensor) -> Tensor:
    """YCxCz: luminance, red-green, blue-yellow, all linear in RGB."""
    x, y, z = _relative_xyz(linear).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def _from_opponents(opponents: Tensor) -> Tensor:
    luminance, red_green, blue_yellow = opponents.unbind(1)
    y = (luminance + 16) / 116
    relative = torch.stack([y + red_green / 500, y, y - blue_yellow / 200], 1)
    return _mixed(torch.linalg.inv(_TO_XYZ / _TO_XYZ.sum(1, keepdim=True)), relative)


def _hunt_lab(linear: Tensor) -> Tensor:
    """CIE Lab with colours less distinct where it is dark."""
    relative, low = _relative_xyz(linear), 6 / 29
    bent = torch.where(
        relative > low**3, relative.clamp(min=1e-6) ** (1 / 3), relative / (3 * low**2) + 4 / 29
    )
    x, y, z = bent.unbind(1)
    lightness = 116 * y - 16
    return torch.stack(
        [lightness, 0.01 * lightness * 500 * (x - y), 0.01 * lightness * 200 * (y - z)], 1
    )


def _hyab(one: Tensor, other: Tensor) -> Tensor:
    difference = one - other
    return difference[:, 0].abs() + torch.hypot(difference[:, 1], difference[:, 2])
