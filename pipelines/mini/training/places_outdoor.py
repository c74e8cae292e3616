"""Six places under the open sky. Each takes a `Scene` and returns rgb [clips, 3, T, H, W].

Layers are painted from far to near; a layer at depth p (0 far, 1 near) moves by p times the pan.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vdit_sparse.pipelines.mini.training.scene import Scene, mix
from vdit_sparse.pipelines.mini.training.sky import sky, sun_x


@dataclass(frozen=True)
class Layer:
    """A range of hills: depth, mean height of its top (y), how high and how wide its hills are."""

    depth: float
    top: float
    height: float
    frequency: float
    colour: tuple[float, float, float]


def _hills(scene: Scene, layer: Layer, key: str, jag: float = 0.0) -> tuple[Tensor, Tensor]:
    """x in the layer, and how far each pixel lies below its ridge."""
    x = scene.x + scene.pan * layer.depth
    return x, scene.y - layer.top + scene.ridge(key, x, layer.frequency, layer.height, jag)


def _lit(scene: Scene, key: str, rgb: tuple[float, float, float], spread: float = 0.05) -> Tensor:
    return scene.varied(key, rgb, spread) * scene.light


_MEADOW = (
    Layer(0.25, 0.12, 0.20, 0.9, (0.42, 0.62, 0.55)),
    Layer(0.50, 0.30, 0.17, 1.2, (0.36, 0.64, 0.33)),
    Layer(1.00, 0.52, 0.10, 1.5, (0.40, 0.72, 0.25)),
)


def meadow(scene: Scene) -> Tensor:
    rgb = sky(scene)
    for i, layer in enumerate(_MEADOW):
        x, below = _hills(scene, layer, f"hill {i}")
        stretch = ((0.5, 1.0), (0.7, 1.4), (1.0, 2.2))[i]
        shade = 0.80 + 0.34 * scene.noise(x * stretch[0], below * stretch[1])
        shade = shade * (1.08 - 0.38 * below.clamp(0, 1))
        rgb = scene.over(rgb, _lit(scene, f"hill colour {i}", layer.colour) * shade, below)
    return mix(rgb, _lit(scene, "flower", (0.95, 0.75, 0.55), 0.25), _flowers(scene))


def _flowers(scene: Scene) -> Tensor:
    cells = 9.0
    u, v = (scene.x + scene.pan) * cells, scene.y * cells * 1.6
    i, j = u.floor(), v.floor()
    kind, height = scene.cells(i, j, "flower kind"), scene.cells(i, j, "flower height")
    distance = torch.hypot(u - i - 0.3 - 0.4 * kind, v - j - 0.3 - 0.4 * height)
    return (kind > 0.55) * scene.cover((0.17 - distance) / cells) * (scene.y > 0.64)


def ocean(scene: Scene) -> Tensor:
    y, t = scene.y, scene.t
    horizon = scene.uniform("horizon", 0.0, 0.22)
    depth = (y - horizon).clamp(min=1e-3)
    x = scene.x + scene.pan * (0.15 + 0.85 * depth)
    near = 1.0 / (depth + 0.16)
    swell = 15 * scene.noise(x * near * 0.105, near * 0.21 - t * 0.12, 1)
    waves = torch.sin(near * 11 - t * 7 + swell)
    ripples = torch.sin(x * near * 5 + t * 4 + near * 3 + scene.uniform("ripple", 0, 6))
    deep = _lit(scene, "deep sea", (0.05, 0.33, 0.55), 0.06)
    shallow = _lit(scene, "shallow sea", (0.22, 0.66, 0.76), 0.08)
    share = 0.42 + 0.2 * waves + 0.13 * ripples + 0.25 * (1 - depth)
    sea = mix(deep, shallow, share.clamp(0, 1))
    glitter = torch.exp(-(((scene.x - sun_x(scene)) / (0.10 + 0.35 * depth)) ** 2))
    sparkle = (waves * ripples * 2.5 + 0.2).clamp(0, 1)
    glitter = glitter * sparkle * (0.35 + 0.3 * scene.sunset + 0.1 * scene.night)
    gold = mix(scene.colour(1.0, 0.95, 0.8), scene.colour(1.0, 0.7, 0.4), scene.sunset)
    return scene.over(sky(scene), sea + glitter * gold, y - horizon)


_MOUNTAINS = (
    Layer(0.20, 0.05, 0.60, 1.1, (0.50, 0.58, 0.74)),
    Layer(0.45, 0.32, 0.46, 1.4, (0.36, 0.42, 0.55)),
)
_SNOW_FIELD = Layer(1.0, 0.62, 0.07, 1.2, (0.92, 0.95, 1.0))


def mountains(scene: Scene) -> Tensor:
    rgb = sky(scene)
    for i, layer in enumerate(_MOUNTAINS):
        x, below = _hills(scene, layer, f"peak {i}", jag=0.85)
        rough = scene.noise(x * 0.6, scene.y * 0.6)
        facet = 0.5 + 0.5 * torch.sin(x * 9 + 4 * rough + below * 6)
        rock = _lit(scene, f"rock {i}", layer.colour, 0.04) * (0.75 + 0.4 * facet * rough)
        snow = scene.colour(0.97, 0.98, 1.0) * scene.light * (0.82 + 0.18 * facet)
        snow_line = (0.26, 0.18)[i] + 0.3 * (scene.noise(x * 0.6, scene.y * 0.6, 2) - 0.5)
        rgb = scene.over(rgb, scene.over(snow, rock, below - snow_line), below)
    x, below = _hills(scene, _SNOW_FIELD, "snow field")
    shade = 0.84 + 0.2 * scene.noise(x * 0.5, scene.y * 0.9, 1)
    return scene.over(rgb, scene.colour(*_SNOW_FIELD.colour) * scene.light * shade, below)


def city(scene: Scene) -> Tensor:
    rgb = sky(scene)
    rgb = _houses(scene, rgb, Layer(0.30, -0.45, 0.70, 3.1, (0.55, 0.60, 0.72)), "far")
    rgb = _houses(scene, rgb, Layer(0.65, -0.30, 0.75, 2.2, (0.42, 0.42, 0.52)), "near")
    x, y = scene.x + scene.pan, scene.y
    asphalt = scene.colour(0.36, 0.37, 0.42) * scene.light * (0.9 + 0.2 * scene.noise(x, y))
    rgb = scene.over(rgb, asphalt, y - 0.62)
    kerb = scene.colour(0.72, 0.72, 0.74) * scene.light
    rgb = scene.over(rgb, kerb, 0.02 - (y - 0.635).abs())
    dashes = (torch.sin(x * 7) > 0) * scene.cover(0.018 - (y - 0.82).abs())
    return mix(rgb, scene.colour(0.98, 0.92, 0.55) * scene.light, dashes)


def _houses(scene: Scene, rgb: Tensor, layer: Layer, key: str) -> Tensor:
    """A row of houses with windows; `layer.frequency` houses in half the screen's height."""
    y, per_unit = scene.y, layer.frequency
    u = (scene.x + scene.pan * layer.depth) * per_unit + scene.uniform(f"{key} houses", 0, 30)
    house = u.floor()
    across = u - house
    top = layer.top + layer.height * scene.cells(house, 0.0, f"{key} roof")
    tone = 0.75 + 0.45 * scene.cells(house, 1.0, f"{key} tone")
    wall = _lit(scene, f"{key} wall", layer.colour, 0.08) * tone * (0.85 + 0.3 * across)

    column, row = across * 6, (y - top) * (28.6 / per_unit)
    i, j = column.floor(), row.floor()
    inside = ((column - i - 0.5).abs() < 0.30) & ((row - j - 0.5).abs() < 0.30)
    window = inside & (i > 0) & (i < 5) & (y > top + 0.05)
    share_lit = 0.25 + 0.35 * scene.night + 0.2 * scene.sunset
    lamp = (scene.cells(house * 8 + i, j, f"{key} lamp") < share_lit).to(y.dtype)
    dark = scene.colour(0.75, 0.88, 0.98) * (1 - 0.5 * scene.night)
    evening = (scene.night + scene.sunset).clamp(max=1)
    glass = mix(dark, scene.colour(1.0, 0.86, 0.48), evening * lamp)
    front = mix(wall, glass, window * (0.35 + 0.6 * lamp))
    gap = (0.46 - (across - 0.5).abs()) * (2 / per_unit)
    return scene.over(rgb, front, torch.minimum(y - top, gap))


_DUNES = (
    Layer(0.25, 0.20, 0.16, 0.8, (0.86, 0.66, 0.44)),
    Layer(0.55, 0.38, 0.18, 1.0, (0.92, 0.70, 0.42)),
    Layer(1.00, 0.62, 0.10, 1.2, (0.97, 0.78, 0.48)),
)


def desert(scene: Scene) -> Tensor:
    rgb = sky(scene, clouds=0.35)
    for i, layer in enumerate(_DUNES):
        x, below = _hills(scene, layer, f"dune {i}")
        slope = torch.cos(x * layer.frequency + scene.uniform(f"dune {i} octave 0", 0, 6.283))
        ripples = torch.sin(below * 60 + 12 * scene.noise(x * 0.4, scene.y * 0.5, 1))
        shade = 0.92 + 0.13 * slope + 0.035 * i * ripples
        rgb = scene.over(rgb, _lit(scene, f"sand {i}", layer.colour, 0.04) * shade, below)
    return rgb


@dataclass(frozen=True)
class Trees:
    """A row of trees: depth, trunks in half the height, width of one, y where the crowns end."""

    depth: float
    frequency: float
    trunk: float
    crown: float
    bark: tuple[float, float, float]
    leaves: tuple[float, float, float]


_TREES = (
    Trees(0.30, 3.4, 0.16, -0.50, (0.46, 0.60, 0.44), (0.55, 0.74, 0.45)),
    Trees(0.60, 2.2, 0.17, -0.62, (0.36, 0.44, 0.30), (0.34, 0.60, 0.30)),
    Trees(0.95, 1.3, 0.16, -0.80, (0.36, 0.25, 0.17), (0.22, 0.50, 0.22)),
)
_FOREST_FLOOR = Layer(1.0, 0.55, 0.06, 1.3, (0.38, 0.56, 0.24))


def forest(scene: Scene) -> Tensor:
    y = scene.y
    rgb = mix(
        sky(scene, clouds=0.0), scene.colour(0.72, 0.88, 0.66) * scene.light, scene.column(0.35)
    )
    for i, row in enumerate(_TREES):
        x = scene.x + scene.pan * row.depth
        u = x * row.frequency + scene.uniform(f"trunks {i}", 0, 30)
        tree = u.floor()
        kind = scene.cells(tree, 0.0, f"trunk kind {i}")
        trunk = row.trunk * (0.6 + 0.5 * kind) - (u - tree - 0.3 - 0.4 * kind).abs()
        bark = 0.78 + 0.4 * scene.noise(x * 2.2, y * 0.35)
        colour = _lit(scene, f"bark {i}", row.bark, 0.04) * bark
        rgb = scene.over(rgb, colour, trunk * (1.4 / row.frequency))
        breeze = 0.01 * torch.sin(6.28 * scene.t)
        leaves = scene.noise(x * 0.55 + i * 0.37 + breeze, y * 0.75)
        crown = leaves - 0.44 - 0.62 * (y - row.crown).clamp(min=-0.3)
        green = _lit(scene, f"leaves {i}", row.leaves, 0.07) * (0.62 + 0.6 * leaves)
        rgb = mix(rgb, green, (crown * 9).clamp(0, 1))
    x, below = _hills(scene, _FOREST_FLOOR, "forest floor")
    shade = 0.62 + 0.62 * scene.noise(x * 0.9, y * 2.0)
    return scene.over(rgb, _lit(scene, "grass", _FOREST_FLOOR.colour, 0.06) * shade, below)


OUTDOOR: dict[str, Callable[[Scene], Tensor]] = {
    "meadow": meadow,
    "ocean": ocean,
    "mountains": mountains,
    "city": city,
    "desert": desert,
    "forest": forest,
}
