"""What the judge is asked about a clip, the right answers, and how answers are counted.

A clip has two slots for kinds of things, each with object, colour, count and motion; place, time,
weather and camera are asked once. Every answer stands in the `Spec`, so none is drawn by hand.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vdit_sparse.pipelines.mini.training.captions import Spec
from vdit_sparse.pipelines.mini.training.vocabulary import (
    CAMERAS,
    COLOURS,
    COUNTS,
    MOTIONS,
    PLACES,
    TIMES,
    WEATHER,
    every_name,
)

SLOTS = 2
"""Kinds of things in a clip: the grammar draws one or two."""

NOTHING = "none"
"""The answer for an empty slot, a place without times of day, and dry weather."""

OWN = "own"
"""The colour of a thing that captions name no colour for."""

ITEM_KINDS = ("object", "colour", "count", "motion")
CLIP_KINDS = ("place", "time", "weather", "camera")

STATEMENTS = "statements"
"""What the accuracy over all that captions say is called in a judge's file."""

Labels = Mapping[str, str]
"""Head -> class."""


def classes() -> dict[str, tuple[str, ...]]:
    """Head -> its classes, in the order of the network's outputs: "object 1" to "motion 2", then
    "place", "time", "weather" and "camera"."""
    item = {
        "object": (NOTHING, *every_name()),
        "colour": (NOTHING, OWN, *COLOURS),
        "count": (NOTHING, "1", *map(str, COUNTS)),
        "motion": (NOTHING, *MOTIONS),
    }
    clip = {
        "place": tuple(PLACES),
        "time": tuple(time or NOTHING for time in TIMES),
        "weather": tuple(weather or NOTHING for weather in WEATHER),
        "camera": tuple(CAMERAS),
    }
    return {head(kind, slot): item[kind] for slot in range(SLOTS) for kind in ITEM_KINDS} | clip


def head(kind: str, slot: int) -> str:
    """The name of a slot's head: `head("colour", 0)` is "colour 1"."""
    return f"{kind} {slot + 1}"


def labels(spec: Spec) -> dict[str, str]:
    """The right answer of every head.

    Slots are filled in the vocabulary's order of names, not in the caption's: which of two things
    a caption names first need not show in the picture (both may cross it), their names do. A free
    slot is `NOTHING` throughout. Raises ValueError for more kinds of things than slots.
    """
    if len(spec.items) > SLOTS:
        raise ValueError(
            f"Expected at most {SLOTS} kinds of things in a clip, got {len(spec.items)}: the judge "
            "has no heads for more."
        )
    order = every_name()
    items = sorted(spec.items, key=lambda item: (order.index(item.name), item.motion))
    found = {head(kind, slot): NOTHING for slot in range(SLOTS) for kind in ITEM_KINDS}
    for slot, item in enumerate(items):
        values = (item.name, item.colour or OWN, str(item.count), item.motion)
        found |= {head(kind, slot): value for kind, value in zip(ITEM_KINDS, values, strict=True)}
    return found | {
        "place": spec.place,
        "time": spec.time or NOTHING,
        "weather": spec.weather or NOTHING,
        "camera": spec.camera,
    }


@dataclass(frozen=True)
class Score:
    """How many of the `asked` answers were right."""

    right: int = 0
    asked: int = 0

    def __add__(self, other: "Score") -> "Score":
        return Score(self.right + other.right, self.asked + other.asked)

    @property
    def accuracy(self) -> float | None:
        """None where nothing was asked."""
        return self.right / self.asked if self.asked else None


DIRECTIONS = ("left", "right", "up", "down")

ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "place": ("place", tuple(PLACES)),
    "time": ("time", tuple(filter(None, TIMES))),
    "weather": ("weather", classes()["weather"]),
    "camera": ("camera", tuple(CAMERAS)),
    "static camera": ("camera", ("static",)),
    "moving camera": ("camera", tuple(camera for camera in CAMERAS if camera != "static")),
    "object": ("object", every_name()),
    "colour": ("colour", tuple(COLOURS)),
    "count": ("count", ("1", *map(str, COUNTS))),
    "two or three": ("count", tuple(map(str, COUNTS))),
    "motion": ("motion", tuple(MOTIONS)),
    "direction": ("motion", DIRECTIONS),
}
"""Row of a report -> the kind of head, and the right answers that it counts. So a place without
times of day, an empty slot and a thing that has no named colour are never counted as right."""


def has_moving_camera(spec: Spec) -> bool:
    """Whether the camera of the clip moves; clips with and without are also counted apart."""
    return spec.camera != "static"


def score(answers: Sequence[Labels], truths: Sequence[Labels]) -> dict[str, Score]:
    """Row -> how many answers were right, over clips.

    answers, truths: of the same clips, every head of `classes()` in each. The two slots count in
    the order that agrees best, for answers about both things may come the other way round.
    """
    totals = dict.fromkeys(ROWS, Score())
    for answer, truth in zip(answers, truths, strict=True):
        matched = max((answer, _exchanged(answer)), key=lambda one: _agreement(one, truth))
        for row, (kind, counted) in ROWS.items():
            for name in _heads(kind):
                if truth[name] in counted:
                    totals[row] += Score(matched[name] == truth[name], 1)
    return totals


def statements(found: Mapping[str, Score]) -> Score:
    """All that captions say, counted together: of `score`'s rows, one for each kind of head."""
    return sum((found[kind] for kind in (*CLIP_KINDS, *ITEM_KINDS)), Score())


def _heads(kind: str) -> list[str]:
    return [kind] if kind in CLIP_KINDS else [head(kind, slot) for slot in range(SLOTS)]


def _exchanged(answer: Labels) -> dict[str, str]:
    first, second = range(SLOTS)
    other = {head(kind, first): answer[head(kind, second)] for kind in ITEM_KINDS}
    other |= {head(kind, second): answer[head(kind, first)] for kind in ITEM_KINDS}
    return {**answer, **other}


def _agreement(answer: Labels, truth: Labels) -> tuple[int, int]:
    """Objects that agree, then everything that does."""
    objects = sum(answer[name] == truth[name] for name in _heads("object"))
    return objects, sum(answer[name] == truth[name] for name in truth)
