"""Things that fill the air: snow, rain, and bubbles under water."""

import torch
from torch import Tensor

from vdit_sparse.pipelines.mini.training.scene import Scene, mix


def weather(scene: Scene, rgb: Tensor) -> Tensor:
    """rgb with falling snow or rain in front, for the clips whose spec says so."""
    kinds = [spec.weather for spec in scene.specs]
    if "snow" in kinds:
        snow = scene.column([kind == "snow" for kind in kinds])
        fall = flakes(scene, scene.screen_x - 0.3 * scene.t - scene.pan, scene.screen_y)
        rgb = mix(rgb, scene.colour(1.0, 1.0, 1.0), 0.9 * snow * fall)
    if "rain" in kinds:
        rain = scene.column([kind == "rain" for kind in kinds])
        rgb = mix(rgb, scene.colour(0.80, 0.86, 0.95), 0.55 * rain * _streaks(scene))
    return rgb


def flakes(
    scene: Scene, x: Tensor, y: Tensor, speed: float = 0.55, cells: float = 9.0, share: float = 0.5
) -> Tensor:
    """Three layers of discs falling towards larger y, opacity [clips, 1, T, H, W].

    cells: of the nearest layer, three units apart; share: of cells that hold a disc.
    """
    layers = []
    for i, (scale, radius) in enumerate(((1.0, 0.10), (1.6, 0.085), (2.4, 0.07))):
        cell = cells * scale / 3
        u = x * cell + 0.25 * torch.sin(6.28 * scene.t + i) + i * 7.3
        v = (y - speed * 2.2 * scene.t / scale**0.5) * cell
        column, row = u.floor(), v.floor()
        size, place, kept = (scene.cells(column, row, f"flake {i} {k}") for k in range(3))
        distance = torch.hypot(u - column - 0.25 - 0.5 * size, v - row - 0.25 - 0.5 * place)
        disc = scene.cover((radius * (0.6 + 0.6 * size) - distance) / cell)
        layers.append(disc * (0.55 + 0.45 * place) * (kept < share))
    return torch.maximum(torch.maximum(layers[0], layers[1]), layers[2])


def _streaks(scene: Scene) -> Tensor:
    x, y = scene.screen_x - scene.pan, scene.screen_y
    u = (x + 0.18 * y) * 26
    column = u.floor()
    kind = scene.cells(column, 0.0, "streak")
    v = y * 0.9 - scene.t * (3.2 + kind) + kind * 9
    across = (1 - (u - column - 0.5).abs() * 5).clamp(0, 1)
    return across * (1 - (v - v.floor() - 0.5).abs() * 7).clamp(0, 1)
