"""The words of the procedural videos: things, places, motions, and how a caption may say them.

Everything here is data. What a sprite is, which way it faces and how it gets about is read from
`sprites/sprites.json`; no picture is opened.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SPRITE_FOLDER = Path(__file__).parent / "sprites"

COLOURS = {
    "red": 0, "orange": 28, "yellow": 50, "green": 130, "blue": 215, "purple": 275, "pink": 330,
}  # fmt: skip
"""Name -> hue in degrees."""

PALE = {"pink": 0.6}
"""Colours that are less saturated than the others -> by how much."""

SHAPES = ("ball", "cube", "triangle", "ring", "diamond", "hexagon")
"""Shaded solids drawn by code, in every colour."""

TINTABLE = (
    "balloon", "car", "heart", "star", "umbrella", "gift", "fish", "butterfly", "scooter", "gem",
    "bell",
)  # fmt: skip
"""Sprites that come in every colour; all others keep their own."""

PLURALS = {
    "fish": "fish", "butterfly": "butterflies", "cactus": "cacti", "bus": "buses", "fox": "foxes",
    "box": "boxes", "octopus": "octopuses", "dice": "dice", "strawberry": "strawberries",
    "grapes": "grapes", "snowman": "snowmen",
}  # fmt: skip

COUNTS = {2: "two", 3: "three"}


@dataclass(frozen=True)
class Thing:
    """What is known of a sprite or shape.

    category: "animal", "vehicle", "food", "plant", "object" or "shape".
    faces: "left", "right", or "front" where mirroring would change nothing that matters.
    way: how it gets about, a key of `WAYS`.
    nose: where a flying nose points in the picture, degrees anticlockwise from right; None for
        things that stay upright. Such a sprite is turned to where it moves.
    file: picture below `SPRITE_FOLDER`, and the code point it shows; None for a shape.
    """

    category: str
    faces: str = "front"
    way: str = "slide"
    nose: float | None = None
    file: str | None = None
    codepoint: str | None = None


@cache
def things() -> dict[str, Thing]:
    """Every name's facts: the sprites of `sprites.json`, then the shapes."""
    entries = json.loads((SPRITE_FOLDER / "sprites.json").read_text())
    sprites = {name: Thing(**entry) for name, entry in entries.items()}
    rollers = ("ball", "ring")
    return sprites | {
        name: Thing("shape", way="roll" if name in rollers else "slide") for name in SHAPES
    }


def every_name() -> tuple[str, ...]:
    """All 94 sprites and the six shapes."""
    return tuple(things())


def has_colours(name: str) -> bool:
    """Whether captions name a colour for `name`, and `Item.colour` must be one of `COLOURS`."""
    return name in TINTABLE or name in SHAPES


@dataclass(frozen=True)
class Place:
    """Where a clip plays: ways to say it, times of day, and whether things stand on a ground."""

    phrases: tuple[str, ...]
    times: tuple[str, ...]
    ground: bool
    weather: tuple[str, ...] = ()


_TIMES = ("day", "sunset", "night")
_NO_TIME = ("",)

PLACES = {
    "meadow": Place(
        (
            "over a green meadow",
            "on a green meadow",
            "across grassy hills",
            "on a meadow with rolling hills",
        ),
        _TIMES,
        True,
        ("snow", "rain"),
    ),
    "ocean": Place(("above the ocean", "over the sea", "above ocean waves"), _TIMES, False),
    "mountains": Place(
        ("in front of snowy mountains", "among snowy peaks", "in the snowy mountains"),
        _TIMES,
        True,
        ("snow",),
    ),
    "city": Place(
        ("in a city", "in the city", "in front of a city skyline", "past tall buildings"),
        _TIMES,
        True,
        ("snow", "rain"),
    ),
    "desert": Place(("in the desert", "over sand dunes", "across a sandy desert"), _TIMES, True),
    "forest": Place(
        ("in the forest", "in a forest", "among the trees", "through a forest"),
        _TIMES,
        True,
        ("snow", "rain"),
    ),
    "space": Place(
        ("in outer space", "in space", "among the stars", "in front of a nebula"), _NO_TIME, False
    ),
    "underwater": Place(("underwater", "under the sea", "deep in blue water"), _NO_TIME, False),
    "neon grid": Place(
        ("over a neon grid", "on a glowing neon grid", "on a retro neon grid"), _NO_TIME, True
    ),
    "room": Place(
        ("in a cosy room", "on a wooden floor", "in a room with wallpaper"), _NO_TIME, True
    ),
    "clouds": Place(("high in the clouds", "in a cloudy sky", "above the clouds"), _TIMES, False),
    "studio": Place(
        ("in a photo studio", "on a plain backdrop", "on a simple background"), _NO_TIME, True
    ),
}

TIMES = {
    "": ("",),
    "day": ("", "", "by day", "on a sunny day"),
    "sunset": ("at sunset", "in the evening"),
    "night": ("at night", "at night", "under the night sky"),
}

WEATHER = {
    "": ("",),
    "snow": ("while snow falls", "in falling snow"),
    "rain": ("in the rain", "while it rains"),
}

CAMERAS = {
    "static": ("", "", "", "static camera"),
    "pan left": ("the camera pans left", "camera panning left"),
    "pan right": ("the camera pans right", "camera panning right"),
    "zoom in": ("the camera zooms in", "camera zooming in"),
    "zoom out": ("the camera zooms out", "camera zooming out"),
    "tilt up": ("the camera tilts up", "camera tilting up"),
}

WAYS = {
    "walk": ("walks", "runs"),
    "swim": ("swims",),
    "fly": ("flies",),
    "float": ("floats",),
    "drive": ("drives",),
    "sail": ("sails",),
    "roll": ("rolls",),
    "crawl": ("crawls",),
    "slide": ("slides",),
}
"""How a thing gets about -> verbs, third person singular."""

AT_HOME = {
    "ocean": ("sail",),
    "underwater": ("swim",),
    "space": ("fly", "float"),
    "clouds": ("fly", "float"),
    "city": ("drive",),
}
"""Place -> the ways of the things that are met there more often; elsewhere those that walk."""

MOTIONS = {
    "right": ("moves to the right", "moves right", "moves from left to right", "goes right"),
    "left": ("moves to the left", "moves left", "moves from right to left", "goes left"),
    "up": ("rises up", "rises up", "moves up", "floats upwards"),
    "down": ("falls down", "moves down", "sinks down"),
    "bounce": ("bounces", "bounces up and down", "hops up and down"),
    "spin": ("rotates in place", "spins around", "spins in place"),
    "circle": ("moves in a circle", "moves in circles", "circles around"),
    "grow": ("comes closer", "grows larger", "gets bigger"),
    "shrink": ("moves away", "shrinks", "gets smaller"),
    "swing": ("swings from side to side", "sways left and right"),
    "still": ("", "stays still", "does not move"),
}

IRREGULAR = {"goes": "go", "flies": "fly", "does": "do"}
