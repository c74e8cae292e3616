"""Colour conversion, blending, and reproducible random numbers for whole batches of clips.

Fields have the shape [clips, 1, T, H, W] and colours [clips, 3, T, H, W]; a size of 1 stands for
everything that does not depend on that direction, and broadcasting does the rest.
"""

import zlib
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_NOISE_SIZE = 512
_NOISE_KINDS = 3


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor, dim: int = -1) -> Tensor:
    """Hue in degrees, saturation and value in [0, 1], any shapes that broadcast; red, green and
    blue are stacked at `dim`.
    """
    channels = []
    for offset in (5.0, 3.0, 1.0):
        k = (offset + hue / 60.0) % 6.0
        channels.append(value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim)


def rgb_to_hsv(rgb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rgb [..., 3] in [0, 1] -> hue in degrees, saturation, value, each [...]."""
    value, spread = rgb.amax(-1), rgb.amax(-1) - rgb.amin(-1)
    red, green, blue = rgb.unbind(-1)
    d = spread.clamp(min=1e-6)
    sector = torch.where(
        value == red,
        (green - blue) / d % 6,
        torch.where(value == green, (blue - red) / d + 2, (red - green) / d + 4),
    )
    return sector * 60 % 360, spread / value.clamp(min=1e-6), value


def uniform(seeds: np.ndarray, key: str) -> np.ndarray:
    """One number in [0, 1) for every seed and key, by splitmix64's mixing steps (Steele, Lea
    and Flood 2014, doi 10.1145/2714064.2660195).

    seeds: uint64 [n]. Returns float64 [n].
    """
    stream = zlib.crc32(key.encode()) * 0xD1B54A32D192ED03 % 2**64
    z = seeds * np.uint64(0x9E3779B97F4A7C15) + np.uint64(stream)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)) / 2.0**53


def lattice(i: Tensor, j: Tensor | float, phase: Tensor) -> Tensor:
    """A number in [0, 1) for every cell (i, j) of an integer lattice, the same on every device.

    i, j: whole numbers in floating point, any shapes that broadcast; phase: a clip's own offset in
    [0, 1). Integer arithmetic (murmur3's mixing steps), so there is no `sin` to differ by a bit.
    """
    column = i.to(torch.int32) * -1640531535
    row = (j.to(torch.int32) if isinstance(j, Tensor) else int(j)) * 668265263
    h = column ^ row ^ (phase * 2**30).to(torch.int32)
    for multiplier in (-2048144789, -1028477387):
        h = (h ^ ((h >> 15) & 0x1FFFF)) * multiplier
    return ((h >> 8) & 0xFFFFFF).to(phase.dtype) / 2**24


@cache
def _noise_texture() -> Tensor:
    """Tileable 1/f noise in [0, 1], [kinds, size + 2, size + 2], rougher kinds first; the border
    repeats the other side, so that bilinear sampling wraps around.
    """
    generator = torch.Generator().manual_seed(7)
    frequency = torch.fft.fftfreq(_NOISE_SIZE)
    radius = torch.hypot(frequency[:, None], frequency[None]) * _NOISE_SIZE
    kinds = []
    for kind in range(_NOISE_KINDS):
        amplitude = torch.where(radius > 0.5, radius.clamp(min=1) ** -(1.55 + 0.35 * kind), 0.0)
        white = torch.randn(_NOISE_SIZE, _NOISE_SIZE, generator=generator)
        field = torch.fft.ifft2(torch.fft.fft2(white) * amplitude).real
        kinds.append(torch.sigmoid(1.7 * (field - field.mean()) / field.std()))
    return F.pad(torch.stack(kinds)[None], (1, 1, 1, 1), mode="circular")[0]


class Noise:
    """Smooth noise of period 1 in both directions, on one device."""

    def __init__(self, device: torch.device | str):
        self.texture = _noise_texture().to(device)

    def __call__(self, u: Tensor, v: Tensor, kind: int = 0) -> Tensor:
        """u, v [n, 1, T, H, W] in periods -> [n, 1, T, H, W] in [0, 1]; kind 0 (rough) to 2."""
        u, v = torch.broadcast_tensors(u, v)
        scale = 2 * _NOISE_SIZE / (_NOISE_SIZE + 2)
        grid = torch.stack([u - u.floor(), v - v.floor()], -1)
        grid = (grid - 0.5) * scale
        clips, _, frames, height, width, _ = grid.shape
        sampled = F.grid_sample(
            self.texture[None, kind : kind + 1],
            grid.reshape(1, clips * frames * height, width, 2),
            mode="bilinear",
            padding_mode="border",
            align_corners=False,
        )
        return sampled.reshape(clips, 1, frames, height, width)
