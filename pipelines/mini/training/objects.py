"""Paints the things of a clip over its place: a soft shadow on the ground, then the sprite."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vdit_sparse.pipelines.mini.training.scene import Scene
from vdit_sparse.pipelines.mini.training.sprites import BORDER, LEVELS, SIZE, Sprites
from vdit_sparse.pipelines.mini.training.tracks import NO_FLOOR, Track, tracks

_OWN_LIGHT = 0.65
"""The share of a thing's brightness that does not depend on the time of day."""


def draw_things(scene: Scene, rgb: Tensor, sprites: Sprites) -> Tensor:
    """Paints on `rgb` [clips, 3, T, H, W], in place.

    The scene's specs must stand in order of falling number of things: so the clips that have a
    k-th thing are the first ones, and no clip is copied to select them.
    """
    clips = [tracks(spec, scene.frames, scene.aspect) for spec in scene.specs]
    counts = [len(things) for things in clips]
    if counts != sorted(counts, reverse=True):
        raise ValueError(f"Expected clips in order of falling number of things, got {counts}.")
    for k in range(counts[0]):
        layer = [things[k] for things in clips if len(things) > k]
        _draw_layer(scene, rgb[: len(layer)], layer, sprites)
    return rgb


def _draw_layer(scene: Scene, rgb: Tensor, layer: list[Track], sprites: Sprites) -> None:
    table = scene.upload(np.stack([track.rows() for track in layer]))
    x, y, size, angle, floor, sign = table.view(len(layer), 6, -1, 1, 1).split(1, dim=1)
    dx, dy = _first(scene.x, layer) - x, _first(scene.y, layer) - y
    if any(track.floor[0] < NO_FLOOR for track in layer):
        rgb *= 1 - _shadow(dx, dy, size, floor - y)
    half = size * 0.5
    cosine, sine = torch.cos(angle) / half, torch.sin(angle) / half
    u = (cosine * dx + sine * dy) * sign
    v = cosine * dy - sine * dx
    pixels = size * _first(scene.zoom, layer) * (scene.height / 2)
    level = torch.log2(SIZE / pixels).clamp(0, LEVELS - 1).expand_as(u)
    inner = SIZE / (SIZE + 2 * BORDER)
    grid = torch.stack([u * inner, v * inner, (2 * level + 1) / LEVELS - 1], -1)[:, 0]
    texture = sprites([(track.item.name, track.item.colour) for track in layer])
    rgba = F.grid_sample(texture, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    light = _first(scene.light, layer) * (1 - _OWN_LIGHT) + _OWN_LIGHT
    rgb.mul_(1 - rgba[:, 3:]).addcmul_(rgba[:, :3], light)


def _first(value: Tensor, layer: list[Track]) -> Tensor:
    """The rows of the layer's clips, of a value that may be the same for all."""
    return value[: len(layer)]


def _shadow(dx: Tensor, dy: Tensor, size: Tensor, drop: Tensor) -> Tensor:
    """Darkness on the ground `drop` below the thing's centre, fainter the higher it is."""
    height = (drop / size - 0.5).clamp(min=0)
    across, along = dx / (0.42 * size), (dy - drop) / (0.085 * size)
    return 0.38 * torch.exp(-(across**2) - along**2) / (1 + 1.6 * height)
