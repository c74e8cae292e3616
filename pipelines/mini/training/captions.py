"""What a procedural clip shows, drawn at random, and the caption that says exactly that.

A `Spec` is all that a renderer needs; its caption is one of `phrasings(spec)`. What a caption
leaves unsaid has a fixed meaning: no time of day is day, no camera is a static one, no weather is
dry, no motion is standing still. So every word can be checked against the pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from vdit_sparse.pipelines.mini.training.vocabulary import (
    AT_HOME,
    CAMERAS,
    COLOURS,
    COUNTS,
    IRREGULAR,
    MOTIONS,
    PLACES,
    PLURALS,
    SHAPES,
    TIMES,
    TINTABLE,
    WAYS,
    WEATHER,
    every_name,
    has_colours,
    things,
)

MOTION_SHARES = {
    "right": 0.19, "left": 0.19, "up": 0.12, "down": 0.10, "bounce": 0.11, "circle": 0.09,
    "grow": 0.07, "spin": 0.06, "shrink": 0.03, "swing": 0.02, "still": 0.02,
}  # fmt: skip
CAMERA_SHARES = {
    "static": 0.40, "pan left": 0.17, "pan right": 0.17, "zoom in": 0.11, "zoom out": 0.10,
    "tilt up": 0.05,
}  # fmt: skip
ITEM_COUNT_SHARES = {1: 0.80, 2: 0.13, 3: 0.07}

EXAMPLES = (
    "a red balloon rises up over a green meadow at sunset",
    "a rocket flies to the right in outer space",
    "a yellow fish swims left deep in blue water, the camera pans right",
    "two blue cars drive left in a city at night",
    "a penguin bounces in front of snowy mountains while snow falls",
    "a ufo moves in a circle over a neon grid",
    "a pink cube rotates in place in a photo studio",
    "an elephant walks to the left in the desert at sunset",
    "a purple butterfly flies to the right in the forest",
    "a robot comes closer in a cosy room",
    "an airplane flies to the left high in the clouds, the camera zooms in",
    "a sailboat sails to the right above the ocean at sunset",
)
"""Twelve prompts for demonstrations, every one inside the grammar."""


@dataclass(frozen=True)
class Item:
    """One kind of thing in a clip; `count` copies of it move together.

    `colour` is a key of `COLOURS` where `has_colours(name)`, else ""; `motion` a key of `MOTIONS`.
    """

    name: str
    colour: str = ""
    count: int = 1
    motion: str = "still"


@dataclass(frozen=True)
class Spec:
    """A clip's whole description; `seed` decides everything that the caption does not say."""

    place: str
    items: tuple[Item, ...]
    time: str = ""
    weather: str = ""
    camera: str = "static"
    seed: int = 0
    caption: str = ""

    def __post_init__(self):
        _check(self.place, PLACES, "place")
        _check(self.time, PLACES[self.place].times, f"time for {self.place}")
        _check(self.weather, WEATHER, "weather")
        _check(self.camera, CAMERAS, "camera")
        for item in self.items:
            _check(item.name, things(), "name")
            _check(item.motion, MOTIONS, "motion")
            _check(item.count, (1, *COUNTS), "count")
            colours = COLOURS if has_colours(item.name) else ("",)
            _check(item.colour, colours, f"colour for {item.name}")


def _check(value, allowed, what: str) -> None:
    if value not in allowed:
        choices = ", ".join(map(repr, allowed))
        raise ValueError(f"Unknown {what} {value!r}: choose one of {choices}.")


def sample_spec(rng: np.random.Generator, names: tuple[str, ...] | None = None) -> Spec:
    """Draws a clip's description, caption inside. Needs no device and opens no picture.

    names: the things to choose from; default all.
    """
    place = _pick(rng, tuple(PLACES))
    weather = ""
    if PLACES[place].weather and rng.random() < 0.22:
        weather = _pick(rng, PLACES[place].weather)
    spec = Spec(
        place=place,
        items=_sample_items(rng, names or every_name(), AT_HOME.get(place, ("walk",))),
        time=_pick(rng, PLACES[place].times),
        weather=weather,
        camera=_weighted(rng, CAMERA_SHARES),
        seed=int(rng.integers(2**31)),
    )
    return replace(spec, caption=write_caption(spec, rng))


def _sample_items(rng, names, ways: tuple[str, ...]) -> tuple[Item, ...]:
    """One or two kinds of things; shapes, those with a colour, and those with one of `ways` come
    more often than their share of `names`.
    """
    kinds = 1 if rng.random() < 0.9 else 2
    items = []
    for _ in range(kinds):
        left = [name for name in names if name not in {item.name for item in items}]
        draw, favoured = rng.random(), left
        if draw < 0.20:
            favoured = SHAPES
        elif draw < 0.45:
            favoured = TINTABLE
        elif draw < 0.60:
            favoured = [name for name in left if things()[name].way in ways]
        name = _pick(rng, [name for name in left if name in favoured] or left)
        items.append(
            Item(
                name=name,
                colour=_pick(rng, tuple(COLOURS)) if has_colours(name) else "",
                count=_weighted(rng, ITEM_COUNT_SHARES) if kinds == 1 else 1,
                motion=_weighted(rng, MOTION_SHARES),
            )
        )
    return tuple(items)


def write_caption(spec: Spec, rng: np.random.Generator) -> str:
    """One of `phrasings(spec)`, at random; the place comes first in every eighth."""
    choice = [_pick(rng, alternatives) for alternatives in _slots(spec)]
    return _join(spec, choice, place_first=rng.random() < 0.125)


def phrasings(spec: Spec) -> Iterator[str]:
    """Every caption that the grammar has for `spec`."""
    for choice in product(*(dict.fromkeys(alternatives) for alternatives in _slots(spec))):
        for place_first in (False, True):
            yield _join(spec, choice, place_first)


def _slots(spec: Spec) -> list[tuple[str, ...]]:
    """Alternatives in order: each item's motion, place, time, weather, camera."""
    times = TIMES[spec.time]
    if spec.time == "day" and spec.weather:
        times = ("",)  # not "on a sunny day in the rain"
    return [
        *(_motion_phrases(item, spec.place) for item in spec.items),
        PLACES[spec.place].phrases,
        times,
        WEATHER[spec.weather],
        CAMERAS[spec.camera],
    ]


def _join(spec: Spec, choice, place_first: bool) -> str:
    motions, (place, time, weather, camera) = choice[:-4], choice[-4:]
    pairs = zip(spec.items, motions, strict=True)
    main = " and ".join(f"{subject(item)} {motion}".strip() for item, motion in pairs)
    where = f"{place} {time}".strip()
    clause = f"{where}, {main} {weather}" if place_first else f"{main} {where} {weather}"
    return ", ".join(part for part in (clause.strip(), camera) if part)


def subject(item: Item) -> str:
    """The item with its number and colour: "a ufo", "an orange star", "two blue cars"."""
    name = item.name
    if item.count > 1:
        name = PLURALS.get(name, name + "s")
    noun = f"{item.colour} {name}".strip()
    if item.count > 1:
        return f"{COUNTS[item.count]} {noun}"
    if name == "grapes":
        return "a bunch of grapes"
    return f"an {noun}" if noun[0] in "aeiou" and noun != "ufo" else f"a {noun}"


def _motion_phrases(item: Item, place: str) -> tuple[str, ...]:
    """The general phrases for the motion, then those with the thing's own verb."""
    general, own = MOTIONS[item.motion], ()
    verbs = _verbs(things()[item.name].way, place)
    if item.motion in ("left", "right"):
        side, other = item.motion, "left" if item.motion == "right" else "right"
        own = tuple(
            f"{verb} {phrase}"
            for verb in verbs
            for phrase in (f"to the {side}", side, f"from {other} to {side}")
        )
    elif item.motion == "circle":
        own = tuple(f"{verb} in a circle" for verb in verbs)
    phrases = general + own
    return tuple(_plural_verb(phrase) for phrase in phrases) if item.count > 1 else phrases


def _verbs(way: str, place: str) -> tuple[str, ...]:
    if way in ("swim", "sail"):
        return WAYS[way] if place in ("underwater", "ocean") else ()
    if way in ("fly", "float") or PLACES[place].ground:
        return WAYS[way]
    return WAYS["float"]


def _plural_verb(phrase: str) -> str:
    verb, _, rest = phrase.partition(" ")
    plural = IRREGULAR.get(verb) or verb.removesuffix("s")
    return f"{plural} {rest}".strip()


def _pick(rng: np.random.Generator, choices):
    return choices[int(rng.integers(len(choices)))]


def _weighted(rng: np.random.Generator, shares: dict):
    names = tuple(shares)
    edges = np.cumsum(tuple(shares.values()))
    return names[int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))]
