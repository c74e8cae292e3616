"""Textures of the things in a clip: tinted sprites and shaded shapes, each at three sizes."""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vdit_sparse.pipelines.mini.training.palette import hsv_to_rgb, rgb_to_hsv
from vdit_sparse.pipelines.mini.training.vocabulary import COLOURS, PALE, SPRITE_FOLDER, things

SIZE = 128
"""Side of a sprite in its texture, in pixels."""

BORDER = 4
"""Transparent pixels around it: sampling outside gives nothing."""

LEVELS = 3
"""Each level is the picture smoothed for half the size of the one before."""


class Sprites:
    """The textures on one device; each is made when it is first asked for."""

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self._textures: dict[tuple[str, str], Tensor] = {}

    def __call__(self, keys: Sequence[tuple[str, str]]) -> Tensor:
        """(name, colour) pairs -> premultiplied RGBA [n, 4, LEVELS, side, side], side 136."""
        for key in keys:
            if key not in self._textures:
                self._textures[key] = texture(*key).to(self.device)
        return torch.stack([self._textures[key] for key in keys])


@cache
def texture(name: str, colour: str) -> Tensor:
    """Premultiplied RGBA in [0, 1], [4, LEVELS, side, side] on the CPU."""
    if things()[name].file is None:
        rgba = _shape(name, colour)
    else:
        rgba = _picture(name)
        if colour:
            rgba = tint(rgba, COLOURS[colour], PALE.get(colour, 1.0))
    flat = rgba.permute(2, 0, 1)[None]
    flat = torch.cat([flat[:, :3] * flat[:, 3:], flat[:, 3:]], 1)
    flat = F.pad(flat, (BORDER,) * 4)
    levels = [flat]
    for level in range(1, LEVELS):
        small = F.avg_pool2d(flat, 2**level)
        levels.append(
            F.interpolate(small, size=flat.shape[-2:], mode="bilinear", align_corners=False)
        )
    return torch.stack(levels, 2)[0].contiguous()


def _picture(name: str) -> Tensor:
    """The sprite as float RGBA [SIZE, SIZE, 4], straight alpha."""
    from PIL import Image

    with Image.open(SPRITE_FOLDER / things()[name].file) as image:
        image = image.convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(image, np.float32) / 255)


def tint(rgba: Tensor, hue: float, strength: float = 1.0) -> Tensor:
    """Turns the dominant hue of a picture [H, W, 4] to `hue` degrees; greys and other hues stay.

    strength: what its saturation is multiplied by.
    """
    h, s, v = rgb_to_hsv(rgba[..., :3])
    weight = rgba[..., 3] * s * v
    histogram = torch.bincount((h / 10).long().clamp(max=35).flatten(), weight.flatten(), 36)
    histogram = histogram + histogram.roll(1) + histogram.roll(-1)
    dominant = histogram.argmax() * 10 + 5
    offset = (h - dominant + 180) % 360 - 180
    changed = (offset.abs() < 55) & (s > 0.2)
    opaque = changed & (rgba[..., 3] > 0.5)
    brighter = stronger = 1.0
    if opaque.any():  # a dark picture would make a brown of orange, a pale one a pink of red
        brighter = (0.93 / v[opaque].quantile(0.8).clamp(min=0.3)).clamp(1, 1.7)
        stronger = (0.80 / s[opaque].median().clamp(min=0.3)).clamp(1, 1.7)
    h = torch.where(changed, (hue + 0.35 * offset) % 360, h)
    s = torch.where(changed, (s * stronger).clamp(0, 1) * strength, s)
    v = torch.where(changed, (v * brighter).clamp(0, 1), v)
    return torch.cat([hsv_to_rgb(h, s, v), rgba[..., 3:]], -1)


def _shape(name: str, colour: str) -> Tensor:
    """A shaded solid [SIZE, SIZE, 4]: a height over the plane, lit from the upper left."""
    axis = (torch.arange(2 * SIZE) + 0.5) / SIZE - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    distance, height = _profile(name, x, y)
    slope_y, slope_x = torch.gradient(height, spacing=1 / SIZE)
    normal = F.normalize(torch.stack([-slope_x, -slope_y, torch.ones_like(height)], -1), dim=-1)
    to_light = torch.tensor([-0.45, -0.65, 0.61])
    halfway = F.normalize(to_light + torch.tensor([0.0, 0.0, 1.0]), dim=0)
    diffuse = (normal @ to_light).clamp(0, 1)[..., None]
    shine = ((normal @ halfway).clamp(0, 1) ** 40)[..., None]
    hue, saturation = torch.tensor(float(COLOURS[colour])), 0.82 * PALE.get(colour, 1.0)
    base = hsv_to_rgb(hue, torch.tensor(saturation), torch.tensor(0.98))
    rgb = (base * (0.48 + 0.74 * diffuse) + 0.75 * shine).clamp(0, 1)
    alpha = (0.5 - distance * SIZE / 1.5).clamp(0, 1)[..., None]
    fine = torch.cat([rgb * alpha, alpha], -1).permute(2, 0, 1)[None]
    coarse = F.avg_pool2d(fine, 2)[0].permute(1, 2, 0)
    return torch.cat([coarse[..., :3] / coarse[..., 3:].clamp(min=1e-6), coarse[..., 3:]], -1)


def _profile(name: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Signed distance to the outline (negative inside), and the height of the surface."""
    radius = torch.hypot(x, y)
    if name == "ball":
        return radius - 0.86, (0.86**2 - radius**2).clamp(min=0).sqrt()
    if name == "ring":
        across = radius - 0.62
        return across.abs() - 0.25, (0.25**2 - across**2).clamp(min=0).sqrt()
    distance = _OUTLINES[name](x, y)
    bevel = 1 - (-distance / 0.2).clamp(0, 1)
    return distance, 0.2 * (1 - bevel**2).clamp(min=0).sqrt()


def _cube(x: Tensor, y: Tensor) -> Tensor:
    qx, qy = x.abs() - 0.58, y.abs() - 0.58
    outside = torch.hypot(qx.clamp(min=0), qy.clamp(min=0))
    return outside + torch.maximum(qx, qy).clamp(max=0) - 0.12


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    return (x.abs() * 1.15 + y.abs()) / 1.52 - 0.56


def _hexagon(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs() * 0.866 + y.abs() * 0.5, y.abs()) - 0.76


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    """An equilateral triangle, point up, with round corners."""
    slope, half = math.sqrt(3), 0.72
    px, py = x.abs() - half, 0.18 - y + half / slope
    fold = px + slope * py > 0
    folded_x, folded_y = (px - slope * py) / 2, (-slope * px - py) / 2
    px, py = torch.where(fold, folded_x, px), torch.where(fold, folded_y, py)
    px = px - px.clamp(-2 * half, 0)
    return -torch.hypot(px, py) * py.sign() - 0.12


_OUTLINES = {"cube": _cube, "diamond": _diamond, "hexagon": _hexagon, "triangle": _triangle}
