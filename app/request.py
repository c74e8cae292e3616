"""What a generate command is asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vdit_sparse.app.options import (
    CHECKS,
    DENSE_BACKENDS,
    DTYPES,
    OFFLOADS,
    PARALLELS,
    RunChoice,
    parse_calibrated,
    parse_choice,
    parse_compare,
    parse_lora,
    parse_run,
    parse_size,
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the caller wants; None leaves it to the model.

    runs: in this order; the first dense one is the reference of the others. model: None for the
    bundled one. base: where the other parts of a file with weights come from. size: (height,
    width) in pixels. image: first frame, for models that take one. loras: (id or path, weight).
    check: what a look at each layer's first sparse call does, one of `CHECKS`. parallel: what
    torchrun's processes share, one of `PARALLELS`. command: the command line, for the report.
    """

    prompt: str
    runs: tuple[RunChoice, ...]
    out: Path
    model: str | None = None
    base: str | None = None
    negative_prompt: str | None = None
    guidance_scale: float | None = None
    steps: int | None = None
    seed: int = 0
    size: tuple[int, int] | None = None
    num_frames: int | None = None
    image: Path | None = None
    loras: tuple[tuple[str, float], ...] = ()
    offload: str = "none"
    compile: bool = False
    dtype: str | None = None
    device: str | None = None
    dense_backend: str | None = None
    check: str = "warn"
    parallel: str = "tokens"
    overwrite: bool = False
    command: str | None = None


def parse_request(words: Mapping) -> Request:
    """The request of a command line, given as option -> text, number, list of texts or None.

    Raises InputError for a word that means nothing.
    """
    # Not every command has them.
    words = {"base": None, "check": "warn", "calibration": None, "parallel": "tokens", **words}
    for option, choices in (
        ("offload", OFFLOADS),
        ("dtype", DTYPES),
        ("dense_backend", DENSE_BACKENDS),
        ("check", CHECKS),
        ("parallel", PARALLELS),
    ):
        if words[option] is not None:
            parse_choice(f"--{option.replace('_', '-')}", words[option], choices)
    method, settings = words["method"], list(words["set_"] or ())
    if words["calibration"] is not None:
        method = parse_calibrated(words["calibration"], method)
        settings.append(f"calibration={words['calibration']}")
    chosen = parse_run(method, settings, words["preset"])
    compared = [parse_compare(text) for text in words["compare"] or ()]
    same = "prompt negative_prompt guidance_scale steps seed num_frames model base offload compile"
    same += " dtype device dense_backend check parallel overwrite command"
    return Request(
        **{name: words[name] for name in same.split()},
        runs=(chosen, *compared),
        out=Path(words["out"]),
        size=None if words["size"] is None else parse_size(words["size"]),
        image=None if words["image"] is None else Path(words["image"]),
        loras=tuple(parse_lora(text) for text in words["lora"] or ()),
    )
