"""Where every thing of a clip is in every frame, and how large and how turned.

Positions are in the scene's units (half the height, y downwards). A motion spans the whole clip, so
more frames make it slower and finer, never longer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from vdit_sparse.pipelines.mini.training.captions import Item, Spec
from vdit_sparse.pipelines.mini.training.vocabulary import PLACES, Thing, things

FLOOR = 0.66
"""y of the line on which things stand."""

NO_FLOOR = 9.0
"""A floor so far down that no shadow is seen."""

_FEET = 0.47
"""From a sprite's centre to its feet, as a share of its size."""

_SIZES = {1: (0.72, 0.98), 2: (0.56, 0.72), 3: (0.46, 0.58)}
"""Number of things in the clip -> least and largest size (a sprite's side)."""

_STANDING = ("left", "right", "bounce", "spin", "grow", "shrink", "swing", "still")


@dataclass(frozen=True)
class Track:
    """One thing through the clip; every array is float64 [T].

    angle: clockwise, in radians; floor: y of its shadow; mirrored: left and right exchanged.
    """

    item: Item
    x: np.ndarray
    y: np.ndarray
    size: np.ndarray
    angle: np.ndarray
    floor: np.ndarray
    mirrored: bool

    def rows(self) -> np.ndarray:
        """x, y, size, angle, floor and the mirror's sign, [6, T]."""
        sign = np.full_like(self.x, -1.0 if self.mirrored else 1.0)
        return np.stack([self.x, self.y, self.size, self.angle, self.floor, sign])


@dataclass(frozen=True)
class _Start:
    """What a motion starts from.

    u: time [T] in [0, 1]; x, y, size: home; copy, count: which of its kind, and how many; centre:
    the middle of its kind; span: the share of the screen that stays in view; rng: its own.
    """

    u: np.ndarray
    x: float
    y: float
    size: float
    aspect: float
    copy: int
    count: int
    centre: float
    way: str
    span: float
    rng: np.random.Generator


_Path = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""x, y, size and angle, each [T] or a number."""


def tracks(spec: Spec, frames: int, aspect: float) -> list[Track]:
    """The tracks of all things of a clip, in the order of its items."""
    return list(_tracks(spec, np.linspace(0, 1, frames), aspect))


def _tracks(spec: Spec, u: np.ndarray, aspect: float) -> Iterator[Track]:
    total = sum(item.count for item in spec.items)
    places = [(i - (total - 1) / 2) * (1.24 * aspect / total) for i in range(total)]
    span = 0.75 if spec.camera.startswith("zoom") else 1.0
    slot = 0
    for kind, item in enumerate(spec.items):
        thing = things()[item.name]
        centre = float(np.mean(places[slot : slot + item.count]))
        for copy in range(item.count):
            rng = np.random.default_rng([spec.seed, kind])  # copies move alike
            size = rng.uniform(*_SIZES[min(total, 3)])
            y, standing = _home(spec.place, item, thing, size, rng)
            start = _Start(
                u=u,
                x=rng.uniform(-0.45, 0.45) if total == 1 else places[slot],
                y=y + (0 if total == 1 else (0.08 if standing else 0.15) * (-1) ** (slot + 1)),
                size=size,
                aspect=aspect,
                copy=copy,
                count=item.count,
                centre=centre,
                way=thing.way,
                span=span,
                rng=rng,
            )
            yield _track(item, thing, start, standing)
            slot += 1


def _home(place: str, item: Item, thing: Thing, size: float, rng) -> tuple[float, bool]:
    """The height at which a thing lives, and whether it stands on a ground there."""
    ground = PLACES[place].ground
    height, bold = rng.uniform(0, 1), rng.random() < 0.5
    hovers = thing.category == "shape" and thing.way != "roll" and bold
    flies = thing.way in ("fly", "float") or hovers
    if thing.way == "sail" and place == "ocean":
        return 0.58 - _FEET * size, False
    if not ground:
        return -0.35 + 0.7 * height, False
    standing = item.motion in _STANDING and (not flies or item.motion == "bounce")
    return FLOOR - _FEET * size - (0 if standing else 0.15 + 0.6 * height), standing


def _track(item: Item, thing: Thing, start: _Start, standing: bool) -> Track:
    path = _PATHS[item.motion](start)
    x, y, size, angle = (np.broadcast_to(np.asarray(a, float), start.u.shape) for a in path)
    floor = np.full_like(start.u, NO_FLOOR)
    if standing:
        floor = np.full_like(start.u, start.y + _FEET * start.size)
        if item.motion in ("grow", "shrink"):  # feet stay on the ground, nearer when larger
            floor = floor + 0.12 * np.log(size / start.size)
            y = floor - _FEET * size
    if thing.nose is not None and item.motion in ("left", "right", "up", "down", "circle"):
        angle = _heading(x, y) + np.radians(thing.nose)
    turned = item.motion in ("left", "right") and thing.nose is None
    mirrored = turned and thing.faces not in ("front", item.motion)
    return Track(item, x, y, size, angle, floor, mirrored)


def _heading(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The direction of travel, clockwise from right (y points down)."""
    if len(x) < 2:
        return np.zeros_like(x)
    return np.unwrap(np.arctan2(np.gradient(y), np.gradient(x)))


def _sideways(start: _Start, side: int) -> _Path:
    u, rng = start.u, start.rng
    gap, middle = 1.25 * start.size, (start.count - 1) / 2
    reach = start.span * start.aspect * rng.uniform(0.50, 0.75) - 0.6 * middle * gap
    x = side * reach * (2 * u - 1) + (start.copy - middle) * gap
    steps, phase = rng.integers(3, 5), rng.random()
    y, angle = start.y, 0.0
    if start.way == "walk":
        y = start.y - 0.04 * np.abs(np.sin(np.pi * (2 * steps * u + phase)))
        angle = 0.07 * np.sin(2 * np.pi * (steps * u + phase / 2))
    elif start.way in ("fly", "float", "swim", "sail"):
        y = start.y + 0.03 * np.sin(2 * np.pi * (2 * u + phase))
    elif start.way == "roll":
        angle = x / (start.size * 0.5)
    return x, y, start.size, angle


def _right(start: _Start) -> _Path:
    return _sideways(start, 1)


def _left(start: _Start) -> _Path:
    return _sideways(start, -1)


def _vertical(start: _Start, side: int) -> _Path:
    u, rng = start.u, start.rng
    y = side * start.span * rng.uniform(0.58, 0.82) * (2 * u - 1)
    phase = rng.random()
    x = start.x + 0.05 * np.sin(2 * np.pi * (u + phase))
    return x, y, start.size, 0.08 * np.sin(2 * np.pi * (u + phase))


def _up(start: _Start) -> _Path:
    return _vertical(start, -1)


def _down(start: _Start) -> _Path:
    return _vertical(start, 1)


def _bounce(start: _Start) -> _Path:
    hops = start.rng.integers(2, 4)
    phase = (start.u * hops + 0.5 * (start.copy % 2)) % 1.0
    y = start.y - start.rng.uniform(0.45, 0.75) * 4 * phase * (1 - phase)
    return start.x, y, start.size * (1 + 0.05 * np.cos(2 * np.pi * phase)), 0.0


def _spin(start: _Start) -> _Path:
    turn = start.rng.choice([-1, 1]) * start.rng.uniform(0.8, 1.3)
    return start.x, start.y - 0.15, start.size, 2 * np.pi * turn * start.u


def _circle(start: _Start) -> _Path:
    rng = start.rng
    turn, phase, radius = rng.choice([-1, 1]), rng.random(), rng.uniform(0.36, 0.46)
    angle = 2 * np.pi * (turn * start.u + phase + start.copy / start.count)
    x = start.centre + 0.5 * (start.x - start.centre) / start.count + 1.15 * radius * np.cos(angle)
    return x, -0.05 + radius * np.sin(angle), start.size, 0.0


def _grow(start: _Start) -> _Path:
    return start.x, start.y, start.size * 3.0 ** (start.u - 0.55), 0.0


def _shrink(start: _Start) -> _Path:
    return start.x, start.y, start.size * 3.0 ** (0.45 - start.u), 0.0


def _swing(start: _Start) -> _Path:
    sway = np.sin(2 * np.pi * (1.5 * start.u + 0.25 * (start.copy % 2)))
    return start.x + 0.34 * sway, start.y, start.size, 0.30 * sway


def _still(start: _Start) -> _Path:
    return start.x, start.y, start.size, 0.0


_PATHS: dict[str, Callable[[_Start], _Path]] = {
    "right": _right,
    "left": _left,
    "up": _up,
    "down": _down,
    "bounce": _bounce,
    "spin": _spin,
    "circle": _circle,
    "grow": _grow,
    "shrink": _shrink,
    "swing": _swing,
    "still": _still,
}
