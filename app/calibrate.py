"""A calibration file from a text file of prompts: `vdit-sparse calibrate`."""

import re
import shlex
import tempfile
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vdit_sparse.app.checks import MOST_SEED
from vdit_sparse.app.generate import RunFailed
from vdit_sparse.app.loading import opened
from vdit_sparse.app.options import InputError, hint, with_settings
from vdit_sparse.app.request import Request, parse_request
from vdit_sparse.app.terminal import Progress
from vdit_sparse.calibration import Calibration
from vdit_sparse.eval.calibrate import Search, density_of, runs_of
from vdit_sparse.eval.calibrate import calibrate as search_for
from vdit_sparse.eval.calibrators import CALIBRATORS
from vdit_sparse.methods import METHODS

MOST_SEEDS = 1000
# Options of generate that this command has not.
NOT_ASKED = {
    "method": "dense",
    "set_": None,
    "negative_prompt": None,
    "preset": None,
    "compare": None,
    "lora": None,
    "compile": False,
    "dense_backend": None,
    "command": None,
}


@dataclass(frozen=True, kw_only=True)
class CalibrationRequest:
    """What the caller wants.

    name: of the method; out: the file to write; model: which model is loaded, how, and the settings
    of its call (its prompt is the first of `prompts`, its folder that of `out`).
    """

    name: str
    search: Search
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    out: Path
    model: Request
    overwrite: bool = False


def parse_calibration(words: Mapping) -> CalibrationRequest:
    """The request of a command line, given as option -> text, number, list of texts or None.

    Raises InputError for a word that means nothing, and for a prompts file that cannot be used.
    """
    name = words["method"]
    if name not in CALIBRATORS:
        needless = name in METHODS
        said = (
            f"{name} needs no calibration: use it as it is. Methods that do"
            if needless
            else (f"There is no method {name!r} to calibrate{hint(name, CALIBRATORS)}; there are")
        )
        raise InputError(f"{said}: {', '.join(CALIBRATORS)}.")
    search = with_settings(name, CALIBRATORS[name], words["set_"] or ())
    prompts, seeds = read_prompts(Path(words["prompts"])), parse_seeds(words["seeds"])
    out = Path(words["out"])
    folder = {"out": out.parent, "overwrite": True}
    model = {**words, **NOT_ASKED, **folder, "prompt": prompts[0], "seed": max(seeds)}
    return CalibrationRequest(
        name=name,
        search=search,
        prompts=prompts,
        seeds=seeds,
        out=out,
        model=parse_request(model),
        overwrite=words["overwrite"],
    )


def read_prompts(file: Path) -> tuple[str, ...]:
    """The prompts of a UTF-8 text file, one a line; blank lines and those that begin with # do not
    count. Raises InputError, with the number of the line, for what is no text and for repetitions.
    """
    try:
        content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise InputError(f"Cannot read --prompts {file} ({error.strerror}).") from error
    found = {}
    for number, raw in enumerate(content.splitlines(), 1):
        try:
            line = raw.decode().strip()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{file}, line {number}: this is no UTF-8 text ({error.reason}); save it as UTF-8."
            ) from None
        if not line or line.startswith("#"):
            continue
        if any(unicodedata.category(letter) == "Cc" for letter in line):
            raise InputError(f"{file}, line {number}: there are control characters in it.")
        if line in found:
            raise InputError(
                f"{file}, line {number}: line {found[line]} has the same prompt; remove one, or "
                "give several --seeds."
            )
        found[line] = number
    if not found:
        raise InputError(f"{file} has no prompts: write one on each line.")
    return tuple(found)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds from "0,1", "0-3" or "0-3,7"."""
    seeds = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match:
            raise InputError(f"--seeds must be numbers such as 0,1 or 0-3, got {text!r}.")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last <= MOST_SEED or last - first >= MOST_SEEDS:
            raise InputError(
                f"--seeds must be ascending, at most {MOST_SEEDS} and up to {MOST_SEED}, got "
                f"{part.strip()!r}."
            )
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds has a number twice: {text!r}.")
    return tuple(seeds)


def check_file(out: Path, overwrite: bool) -> None:
    """Makes the folder of the output file and tries to write into it. Raises InputError if that
    fails, or if the file is there and may not be overwritten."""
    if out.suffix != ".safetensors":
        raise InputError(f"--out must end in .safetensors, got {out}.")
    if out.is_dir():
        raise InputError(f"--out {out} is a folder: name a file.")
    if out.exists() and not overwrite:
        raise InputError(f"--out {out} is there already: name another file, or add --overwrite.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise InputError(
            f"Cannot write --out {out} ({error.strerror}): name a file in a folder that you may "
            "write to."
        ) from error


def calibrate(request: CalibrationRequest, progress: Progress) -> list[str]:
    """Makes the file, runs the method with it once, and returns lines that say what it is.

    Raises InputError for what the caller can put right, and RunFailed for a run that went wrong.
    """
    check_file(request.out, request.overwrite)
    pipe, settings = opened(request.model, progress)
    found = _search(pipe, request, settings, progress)
    density = _density(pipe, request, settings, progress)
    return _lines(request, found, density)


def _search(pipe, request: CalibrationRequest, settings: dict, progress: Progress) -> Calibration:
    runs = runs_of(request.search, request.prompts, request.seeds)

    def on_step(run: int, done: int, total: int) -> None:
        progress(f"run {run + 1}/{runs}", done, total)

    inputs = {**settings, "out": request.out, "on_step": on_step}
    try:
        return search_for(pipe, request.search, request.prompts, request.seeds, **inputs)
    except Exception as error:
        raise RunFailed(
            f"{type(error).__name__}: {error} ({request.out} was not written)"
        ) from error


def _density(pipe, request: CalibrationRequest, settings: dict, progress: Progress) -> float:
    """Of a run of the method with its new file, which so is seen to work."""
    method = request.search.method(calibration=str(request.out))

    def on_step(done: int, total: int) -> None:
        progress(f"{request.name} run", done, total)

    sample = (request.prompts[0], request.seeds[0])
    try:
        return density_of(pipe, method, *sample, on_step=on_step, **settings)
    except Exception as error:
        raise RunFailed(
            f"{type(error).__name__}: {error} (in a run with {request.out}, which is written)"
        ) from error


def _lines(request: CalibrationRequest, found: Calibration, density: float) -> list[str]:
    grid, asked = found.grid, request.model
    options = {
        "--set": f"calibration={request.out}",
        "--model": asked.model,
        "--size": asked.size and "x".join(map(str, asked.size)),
        "--num-frames": asked.num_frames,
        "--steps": asked.steps,
    }
    given = [word for pair in options.items() if pair[1] is not None for word in map(str, pair)]
    use = ["vdit-sparse", "generate", "--method", request.name, *given]
    return [
        f"{request.out}: {request.out.stat().st_size / 1e3:,.1f} kB",
        f"made for: {grid.frames} x {grid.height} x {grid.width} tokens, {found.layers} layers, "
        f"{found.steps} steps",
        f"made from: prompts {len(found.prompts)}, seeds {len(found.seeds)}",
        f"density: {density:.3f}, the mean over all self-attention of a run with it",
        f'use it with: {shlex.join(use)} --prompt "..." --out DIR',
    ]
