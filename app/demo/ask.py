"""From what a form says to a request, and to the command line that repeats it."""

import dataclasses
import re
import shlex
from pathlib import Path

from vdit_sparse.app.demo.forms import HIDDEN
from vdit_sparse.app.demo.limits import Studio, check_limits
from vdit_sparse.app.demo.models import BUNDLED_NAME, known, resolve
from vdit_sparse.app.options import DENSE, InputError, RunChoice, parse_compare
from vdit_sparse.app.request import Request, parse_request
from vdit_sparse.methods import METHODS

NUMBER = (int, float)
# Entries of a form and their types.
ENTRIES = {
    "prompt": str,
    "negative_prompt": str,
    "model": str,
    "runs": list,
    "steps": int,
    "seed": int,
    "size": str,
    "num_frames": int,
    "guidance_scale": NUMBER,
    "dtype": str,
    "calibration": str,
    "image": str,
}
TYPES = {str: "text", int: "a whole number", list: "a list", NUMBER: "a number"}
# Of these the command line has options of the same name.
OPTIONS = ("negative_prompt", "guidance_scale", "steps", "seed", "size", "num_frames", "dtype")
# What the studio decides, as the words of a command line.
FIXED = {
    "method": DENSE,
    "set_": None,
    "preset": None,
    "compare": None,
    "lora": None,
    "offload": "none",
    "compile": False,
    "dense_backend": None,
    "check": "warn",
    "overwrite": True,
}
# What uploads are called in the folder of a run and in its command line.
CALIBRATION, IMAGE = "calibration.safetensors", "image.png"
UPLOADS = {"calibration": CALIBRATION, "image": IMAGE}


def read(form: dict, studio: Studio, out: Path, uploads: dict[str, Path]) -> Request:
    """The request of a form, whose entries may be left out or None.

    runs: texts as `--compare` takes them: "dense", or a method or preset with ":field=value,...".
    calibration, image: names of files that the user has uploaded, keys of `uploads`; the former is
    for all methods that take one. Raises InputError for whatever is wrong.
    """
    given = {name: value for name, value in form.items() if value not in (None, "")}
    _check_entries(given)
    model = resolve(given.get("model", ""), studio)
    found = known(model)
    # An image is a video of one frame, but its model is not told so.
    if found.images and given.get("num_frames") == 1:
        del given["num_frames"]
    calibration, image = (_uploaded(given.get(name), uploads) for name in UPLOADS)
    runs = [_run(text, calibration) for text in given.get("runs", ())]
    if not runs:
        raise InputError("Choose a method, or dense attention.")
    words = {**FIXED, **{name: given.get(name) for name in OPTIONS}}
    words |= {"prompt": given.get("prompt", ""), "seed": given.get("seed", 0), "out": out}
    words |= {"model": model, "device": studio.device, "image": image}
    words["command"] = shlex.join(command_words(given, calibration, image))
    request = dataclasses.replace(parse_request(words), runs=tuple(runs))
    if found.images and request.num_frames is not None:
        raise InputError(
            f"This model makes images: leave num_frames out, got {request.num_frames}."
        )
    check_limits(request, found.defaults, studio.limits, found.images)
    return request


def command_words(given: dict, calibration: Path | None, image: Path | None) -> list[str]:
    """The words of the command line that makes the same videos, uploads by their plain names."""
    first, *others = (_with(text, calibration and CALIBRATION) for text in given["runs"])
    name, _, fields = first.partition(":")
    known_method = name in (DENSE, *METHODS)
    words = ["vdit-sparse", "generate", "--prompt", given.get("prompt", "")]
    words += ["--method" if known_method else "--preset", name]
    for field in re.split(r",(?=\w+=)", fields) if fields else ():
        words += ["--set", field]
    for text in others:
        words += ["--compare", text]
    if given.get("model", BUNDLED_NAME) != BUNDLED_NAME:
        words += ["--model", given["model"]]
    for option in OPTIONS:
        if option in given:
            words += [f"--{option.replace('_', '-')}", str(given[option])]
    if image is not None:
        words += ["--image", IMAGE]
    return [*words, "--out", "outputs/studio"]


def _check_entries(given: dict) -> None:
    for name, value in given.items():
        if name not in ENTRIES:
            raise InputError(f"A request has no entry {name[:40]!r}; it has: {', '.join(ENTRIES)}.")
        kind = ENTRIES[name]
        if isinstance(value, bool) or not isinstance(value, kind):
            raise InputError(f"{name} must be {TYPES[kind]}, got {str(value)[:80]!r}.")


def _uploaded(name: str | None, uploads: dict[str, Path]) -> Path | None:
    if name is not None and name not in uploads:
        raise InputError("A file that you uploaded is not there any more: upload it again.")
    return uploads.get(name)


def _run(text: object, calibration: Path | None) -> RunChoice:
    if not isinstance(text, str):
        raise InputError(f"A run must be text such as 'radial:block=64', got {str(text)[:80]!r}.")
    hidden = HIDDEN & set(re.findall(r"(\w+)=", text))
    if hidden:
        raise InputError(f"{hidden.pop()} cannot be set by a path here: upload the file.")
    return parse_compare(_with(text, calibration), "A run")


def _with(text: str, calibration: Path | str | None) -> str:
    """A run with the calibration as one of its fields, if its method takes one."""
    choice = parse_compare(text, "A run")
    if calibration is None or not hasattr(choice.method, "calibration"):
        return text
    return f"{text}{',' if ':' in text else ':'}calibration={calibration}"
