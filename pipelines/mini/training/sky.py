"""The sky of every outdoor place: gradient, sun or moon, stars at night, drifting clouds."""

import torch
from torch import Tensor

from vdit_sparse.pipelines.mini.training.scene import Scene, mix

_TOP = {"day": (0.30, 0.58, 0.93), "sunset": (0.32, 0.24, 0.52), "night": (0.03, 0.05, 0.16)}
_BOTTOM = {"day": (0.80, 0.92, 1.00), "sunset": (1.00, 0.62, 0.36), "night": (0.14, 0.18, 0.38)}
_FAR = 0.04
"""The share of a camera's pan that sun and stars show."""


def sky(scene: Scene, clouds: float = 0.8) -> Tensor:
    """The sky behind a group of clips, [clips, 3, T, H, W]; clouds: their opacity."""
    y = scene.y
    top = scene.upload([_TOP[spec.time] for spec in scene.specs]).view(-1, 3, 1, 1, 1)
    bottom = scene.upload([_BOTTOM[spec.time] for spec in scene.specs]).view(-1, 3, 1, 1, 1)
    top = top + scene.uniform("sky tone", -0.06, 0.06)
    rgb = mix(top, bottom, ((y + 1) * 0.5).clamp(0, 1) ** 1.2)
    rgb = _sun(scene, rgb)
    if any(spec.time == "night" for spec in scene.specs):
        rgb = rgb + _stars(scene)
    if clouds:
        rgb = _clouds(scene, rgb, clouds)
    return rgb


def sun_x(scene: Scene) -> Tensor:
    """Where sun or moon stand on the screen, [clips, 1, T, 1, 1]."""
    return scene.uniform("sun x", -1.1, 1.1) - scene.pan * _FAR


def by_time(scene: Scene, day: Tensor, sunset: Tensor, night: Tensor) -> Tensor:
    """The one of three colours that fits each clip's time of day."""
    return mix(mix(day, sunset, scene.sunset), night, scene.night)


def _sun(scene: Scene, rgb: Tensor) -> Tensor:
    y = scene.uniform("sun y", -0.75, -0.35) + scene.sunset * 0.42
    distance = torch.hypot(scene.x - sun_x(scene), scene.y - y)
    colour = by_time(
        scene,
        scene.colour(1.0, 0.97, 0.80),
        scene.colour(1.0, 0.80, 0.42),
        scene.colour(0.95, 0.96, 1.0),
    )
    rgb = rgb + colour * (0.30 * torch.exp(-5 * distance**2))
    return scene.over(rgb, colour, 0.13 + 0.07 * scene.sunset - distance)


def _stars(scene: Scene) -> Tensor:
    u, v = (scene.x + scene.pan * _FAR) * 17, scene.y * 17
    i, j = u.floor(), v.floor()
    kind, side = scene.cells(i, j, "star kind"), scene.cells(i, j, "star side")
    height = scene.cells(i, j, "star height")
    distance = torch.hypot(u - i - 0.2 - 0.6 * side, v - j - 0.2 - 0.6 * height)
    twinkle = 0.7 + 0.3 * torch.sin(scene.t * 9 + kind * 40)
    return scene.night * (kind > 0.72) * ((0.09 - distance) * 14).clamp(0, 1) * twinkle


def _clouds(scene: Scene, rgb: Tensor, opacity: float) -> Tensor:
    drift = scene.uniform("cloud drift", -0.08, 0.08) * scene.t
    u = (scene.x + scene.pan * 0.12 + drift) * 0.16 + scene.uniform("cloud u")
    density = scene.noise(u, scene.y * 0.34 + scene.uniform("cloud v"), 1)
    amount = ((density - scene.uniform("cloud cover", 0.48, 0.68)) * 4.5).clamp(0, 1)
    thin = opacity * (1 - 0.5 * scene.night) * (0.9 - scene.y).clamp(0, 0.8)
    colour = by_time(
        scene,
        scene.colour(1.0, 1.0, 1.0),
        scene.colour(1.0, 0.74, 0.62),
        scene.colour(0.30, 0.34, 0.52),
    )
    return mix(rgb, colour * (0.78 + 0.22 * density), amount * thin)
