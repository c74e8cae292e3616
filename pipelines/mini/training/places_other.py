"""Six more places: space, under water, a neon grid, a room, above the clouds, a photo studio.

Each takes a `Scene` and returns rgb [clips, 3, T, H, W].
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vdit_sparse.pipelines.mini.training.scene import Scene, mix
from vdit_sparse.pipelines.mini.training.sky import by_time, sky
from vdit_sparse.pipelines.mini.training.weather import flakes


def space(scene: Scene) -> Tensor:
    x, y, drift = scene.x + scene.pan * 0.3, scene.y, 0.01 * scene.t
    wide = scene.noise(
        x * 0.15 + scene.uniform("nebula u") + drift, y * 0.15 + scene.uniform("nebula v"), 1
    )
    fine = scene.noise(
        x * 0.22 + scene.uniform("dust u") - drift, y * 0.22 + scene.uniform("dust v")
    )
    hue = scene.uniform("nebula hue", 0, 360)
    first, second = scene.hue(hue, 0.75, 0.85), scene.hue(hue + 70, 0.7, 0.8)
    rgb = scene.colour(0.02, 0.02, 0.06) + first * ((wide - 0.40).clamp(min=0) * 1.5 * fine)
    rgb = rgb + second * ((fine - 0.50).clamp(min=0) * 1.1 * wide)
    for cells, depth, size in ((7.0, 0.3, 0.060), (13.0, 0.15, 0.085)):
        u, v = (scene.x + scene.pan * depth) * cells, y * cells
        i, j = u.floor(), v.floor()
        kind, side = (scene.cells(i, j, f"{what} {cells}") for what in ("kind", "side"))
        distance = torch.hypot(u - i - 0.25 - 0.5 * side, v - j - 0.25 - 0.5 * kind)
        disc = (1 - distance / max(size, 0.9 * scene.pixel * cells)).clamp(0, 1) ** 1.5
        twinkle = 0.65 + 0.35 * torch.sin(scene.t * 8 + kind * 60)
        colour = mix(scene.colour(1.0, 1.0, 1.0), first + 0.4, kind)
        rgb = rgb + (kind > 0.68) * disc * twinkle * colour
    return rgb


def underwater(scene: Scene) -> Tensor:
    y, t = scene.y, scene.t
    x = scene.x + scene.pan * 0.6
    top = scene.varied("water top", (0.22, 0.70, 0.86), 0.06)
    bottom = scene.varied("water bottom", (0.02, 0.16, 0.42))
    rgb = mix(top, bottom, ((y + 1.1) * 0.5).clamp(0, 1))
    slant = x * 2.2 + y * 0.7 + scene.uniform("rays", 0, 6)
    rays = (torch.sin(slant * 2.3 + t * 1.4) * torch.sin(slant * 3.7 - t * 1.1)).clamp(min=0)
    rgb = rgb + scene.colour(0.8, 1.0, 0.95) * (0.20 * rays * (0.75 - y * 0.6).clamp(0, 1))
    rgb = _sea_floor(scene, rgb, "far floor", 0.7, 0.56, (0.30, 0.48, 0.55))
    rgb = _sea_floor(scene, rgb, "near floor", 1.0, 0.74, (0.74, 0.70, 0.52))
    bubbles = flakes(scene, x, -y, speed=0.45, cells=6.0, share=0.16)
    return mix(rgb, scene.colour(0.85, 0.97, 1.0), bubbles * 0.5)


def _sea_floor(scene: Scene, rgb: Tensor, key: str, depth: float, level: float, sand) -> Tensor:
    """A sandy floor with light playing on it, and swaying weeds."""
    y, t = scene.y, scene.t
    x = scene.x + scene.pan * depth
    top = level - scene.ridge(key, x, 1.3, 0.09)
    play = scene.noise(x * 0.55 + 0.05 * t, y * 1.1 - 0.04 * t)
    play = (play - scene.noise(x * 0.5 - 0.06 * t, y + 0.05 * t)).abs()
    colour = scene.varied(f"{key} sand", sand) * (0.74 + 0.5 * torch.exp(-16 * play))
    rgb = scene.over(rgb, colour, y - top)

    cells = 2.6
    u = x * cells + 1.7 * depth
    weed = u.floor()
    kind = scene.cells(weed, 0.0, f"{key} weed")
    along = (top - y) / (0.25 + 0.45 * kind)
    upper = along.clamp(0, 1)
    sway = 0.2 * torch.sin(5 * y + t * 6.28 + kind * 9) * upper
    half_width = 0.075 * (1 - 0.8 * upper) * (kind > 0.35)
    blade = scene.cover((half_width - (u - weed - 0.5 - sway).abs()) / cells)
    blade = blade * (along < 1) * (along > -0.2)
    green = scene.varied(f"{key} green", (0.16, 0.56, 0.36), 0.12) * (1 - 0.3 * upper)
    return mix(rgb, green, blade * 0.95)


def neon_grid(scene: Scene) -> Tensor:
    x, y = scene.x, scene.y
    horizon = scene.uniform("horizon", -0.05, 0.2)
    hue = scene.uniform("neon hue", 255, 330)
    dark, glow = scene.hue(hue, 0.85, 0.16), scene.hue(hue + 25, 0.75, 0.80)
    neon = scene.hue(torch.where(hue > 295, hue - 115, hue + 40), 0.75, 1.0)
    rgb = mix(dark, glow, ((y + 1) / (horizon + 1)).clamp(0, 1) ** 2.2)

    sun_y, radius = horizon - 0.24, 0.44
    distance = torch.hypot(x - scene.uniform("sun x", -0.4, 0.4) + scene.pan * 0.05, y - sun_y)
    share = ((y - sun_y) / radius * 0.5 + 0.5).clamp(0, 1)
    sun = mix(scene.colour(1.0, 0.86, 0.35), scene.colour(1.0, 0.25, 0.55), share)
    stripes = torch.sin((y - sun_y) * 46) > -1 + ((y - sun_y - 0.02) * 3.2).clamp(0, 0.9)
    rgb = mix(rgb, sun, scene.cover(radius - distance) * stripes)
    rgb = rgb + sun * (0.16 * torch.exp(-2.5 * distance**2))
    peaks = scene.ridge("peaks", x + scene.pan * 0.2, 2.2, 0.14, jag=1.0).abs() + 0.02
    rgb = scene.over(rgb, dark * 1.2, y - horizon + peaks)

    far = 1.0 / (y - horizon).clamp(min=4e-3)
    across, along = (x + scene.pan * 0.9) * far * 1.1, far * 1.1 + scene.t * 3.0
    lines = (1 - (across - across.round()).abs() / (0.020 * far + 0.03)).clamp(0, 1)
    rungs = (1 - (along - along.round()).abs() / (0.012 * far * far + 0.03)).clamp(0, 1)
    grid = torch.maximum(lines, rungs) * torch.exp(-0.10 * far) + 0.05
    return scene.over(rgb, dark * 0.7 + neon * grid, y - horizon)


def room(scene: Scene) -> Tensor:
    x, y = scene.x, scene.y
    hue = scene.uniform("wall hue", 0, 360)
    paper, print_colour = scene.hue(hue, 0.30, 0.93), scene.hue(hue + 15, 0.42, 0.82)
    wall = mix(paper, print_colour, _wallpaper(scene) * 0.8)
    wall = wall * (1.03 - 0.16 * (x / scene.aspect) ** 2 - 0.08 * y)

    edge = 0.42
    depth = (y - edge).clamp(min=1e-3)
    near = 1 / (depth + 0.42)
    plank_x = (x + scene.pan * (0.5 + 0.5 * depth)) * near * 3.2
    plank = plank_x.floor()
    seam = (((plank_x - plank - 0.5).abs() - 0.47) * 30).clamp(0, 1)
    wood = scene.varied("wood", (0.72, 0.50, 0.30), 0.10)
    wood = wood * (0.82 + 0.26 * scene.cells(plank, 0.0, "plank"))
    grain = scene.noise(plank_x * 0.08 + plank * 0.37, near * 0.22)
    floor = wood * ((0.86 + 0.22 * grain) * (1 - 0.35 * seam))
    rgb = scene.over(wall, floor, y - edge)
    return scene.over(rgb, scene.colour(0.96, 0.95, 0.92), 0.035 - (y - edge).abs())


def _wallpaper(scene: Scene) -> Tensor:
    """Stripes, dots or zigzags, 0 to 1."""
    x, y = scene.x + scene.pan, scene.y
    stripes = (torch.sin(x * 14) * 3).clamp(0, 1)
    u, v = x * 4.5, y * 4.5
    dots = scene.cover((0.22 - torch.hypot(u - u.round(), v - v.round())) / 4.5)
    triangle = torch.asin(torch.sin(x * 10).clamp(-0.99, 0.99))
    zigzag = (torch.sin((y + 0.12 * triangle) * 20) * 3).clamp(0, 1)
    style = scene.uniform("wallpaper")
    return torch.where(style < 0.35, stripes, torch.where(style < 0.7, dots, zigzag))


def clouds(scene: Scene) -> Tensor:
    y, t = scene.y, scene.t
    rgb = sky(scene, clouds=0.0)
    white = by_time(
        scene,
        scene.colour(1.0, 1.0, 1.0),
        scene.colour(1.0, 0.72, 0.60),
        scene.colour(0.24, 0.28, 0.46),
    )
    layers = (  # depth, drift, scale of u and v, cover, height
        (0.3, 0.05, 0.20, 0.34, 0.66, 0.10),
        (0.6, 0.10, 0.16, 0.27, 0.60, 0.35),
        (1.0, 0.16, 0.13, 0.22, 0.55, 0.70),
    )
    for i, (depth, drift, u, v, cover, height) in enumerate(layers):
        x = scene.x + scene.pan * depth + t * drift
        coarse = scene.noise(x * u + scene.uniform(f"cloud {i}"), y * v + i * 0.31)
        density = 0.65 * coarse + 0.35 * scene.noise(x * 0.5 + i * 0.2, y * 0.8, 1)
        amount = (density - cover + 0.26 * (y - height).clamp(-0.6, 0.6)) * 7
        colour = white * (0.74 + 0.30 * density + 0.04 * i)
        rgb = mix(rgb, colour, amount.clamp(0, 1) * 0.93)
    return rgb


def studio(scene: Scene) -> Tensor:
    y = scene.y
    hue = scene.uniform("backdrop hue", 0, 360)
    light, dark = scene.hue(hue, 0.38, 0.97), scene.hue(hue, 0.55, 0.62)
    lamp = scene.uniform("lamp", -0.5, 0.5) - scene.pan * 0.5
    glow = torch.exp(-((scene.x - lamp) ** 2 * 0.45 + (y + 0.15) ** 2 * 0.8))
    shade = 1 - 0.10 * torch.sigmoid((y - 0.45) * 14)
    texture = 0.97 + 0.05 * scene.noise((scene.x + scene.pan) * 0.6, y * 0.6, 2)
    return mix(dark, light, glow) * shade * texture


OTHER: dict[str, Callable[[Scene], Tensor]] = {
    "space": space,
    "underwater": underwater,
    "neon grid": neon_grid,
    "room": room,
    "clouds": clouds,
    "studio": studio,
}
