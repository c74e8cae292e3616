"""A schedule for one model and size, found on a few prompts: `vdit-sparse tune`."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vdit_sparse.app.calibrate import NOT_ASKED, check_file, parse_seeds, read_prompts
from vdit_sparse.app.checks import BUNDLED
from vdit_sparse.app.generate import RunFailed
from vdit_sparse.app.loading import opened
from vdit_sparse.app.options import InputError, parse_choice, with_settings
from vdit_sparse.app.request import Request, parse_request
from vdit_sparse.app.terminal import Progress
from vdit_sparse.eval.tune import Target, Tuned, tune_each
from vdit_sparse.eval.tune_allocate import OutOfReach
from vdit_sparse.eval.tune_effect import EFFECTS
from vdit_sparse.eval.tune_record import TuneSearch

# Prompts of the bundled model's grammar, none of which the tables of docs/ are measured on.
BUNDLED_PROMPTS = Path(__file__).parent.parent / "eval" / "prompts" / "mini_tuning.txt"
# Samples at once of a model whose memory is not known, and of the bundled one.
BATCH, BUNDLED_BATCH = 1, 8
MOST_ROUNDS = 10_000


@dataclass(frozen=True, kw_only=True)
class TuneRequest:
    """What the caller wants.

    targets: file to write -> target; search, effects, rounds, batch: as in `eval.tune.tune_each`;
    model: which model is loaded, how, and the settings of its call.
    """

    targets: dict[Path, Target]
    search: TuneSearch
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    effects: str | None
    rounds: int
    batch: int
    model: Request
    overwrite: bool = False


def parse_tune(words: Mapping) -> TuneRequest:
    """The request of a command line, given as option -> text, number, list of texts or None.

    Raises InputError for a word that means nothing, and for a prompts file that cannot be used.
    """
    bundled = words["model"] in BUNDLED
    file = words["prompts"] or (BUNDLED_PROMPTS if bundled else None)
    if file is None:
        raise InputError(
            "--prompts is needed with --model: a text file with a few prompts, one a line, like "
            "those that the schedule is meant for."
        )
    out = Path(words["out"])
    targets = _targets(words, out)
    if words["effects"] is not None:
        parse_choice("--effects", words["effects"], EFFECTS)
    for option, least, most in (("rounds", 0, MOST_ROUNDS), ("batch", 1, MOST_ROUNDS)):
        if words[option] is not None and not least <= words[option] <= most:
            raise InputError(f"--{option} must be from {least} to {most}, got {words[option]}.")
    prompts, seeds = read_prompts(Path(file)), parse_seeds(words["seeds"])
    folder = {"out": out.parent, "overwrite": True}
    model = {**words, **NOT_ASKED, **folder, "prompt": prompts[0], "seed": max(seeds)}
    return TuneRequest(
        targets=targets,
        search=with_settings("tune", TuneSearch, words["set_"] or ()),
        prompts=prompts,
        seeds=seeds,
        effects=words["effects"],
        rounds=words["rounds"],
        batch=words["batch"] or (BUNDLED_BATCH if bundled else BATCH),
        model=parse_request(model),
        overwrite=words["overwrite"],
    )


def _targets(words: Mapping, out: Path) -> dict[Path, Target]:
    """File -> target; several densities are in the names of their files."""
    others = {"psnr": words["target_psnr"], "speedup": words["speedup"]}
    densities = words["density"] or [None]
    if len(densities) == 1:
        files = {out: densities[0]}
    else:
        files = {out.with_name(f"{out.stem}-{each:g}{out.suffix}"): each for each in densities}
    if len(files) != len(densities):
        raise InputError(f"--density has the same number twice: {', '.join(map(str, densities))}.")
    try:
        return {file: Target(density=each, **others) for file, each in files.items()}
    except ValueError as error:
        raise InputError(f"Give one of --density, --target-psnr and --speedup: {error}") from error


def tune(request: TuneRequest, progress: Progress) -> list[str]:
    """Makes the files, and returns lines that say what they are.

    Raises InputError for what the caller can put right, and RunFailed for a run that went wrong.
    """
    for file in request.targets:
        check_file(file, request.overwrite)
    pipe, settings = opened(request.model, progress)
    same = {name: getattr(request, name) for name in ("search", "effects", "rounds", "batch")}
    prompts = request.prompts, request.seeds
    every = []
    try:
        for found in tune_each(pipe, *prompts, request.targets, tell=progress, **same, **settings):
            every.append(found)
    except OutOfReach as error:
        raise InputError(f"{error} {_left(request, len(every))}") from error
    except Exception as error:
        raise RunFailed(
            f"{type(error).__name__}: {error} ({_left(request, len(every))})"
        ) from error
    return [line for found in every for line in _lines(request, found)]


def _left(request: TuneRequest, written: int) -> str:
    """Which files are missing after the first `written`."""
    missing = [str(file) for file in list(request.targets)[written:]]
    return f"{', '.join(missing)} {'was' if len(missing) == 1 else 'were'} not written."


def _lines(request: TuneRequest, found: Tuned) -> list[str]:
    made, asked = found.calibration, request.model
    file = Path(made.path)
    target = request.targets[file]
    grid = made.grid
    text = f" and {grid.text} of text" if grid.text else ""
    options = {
        "--calibration": str(file),
        "--model": asked.model,
        "--size": asked.size and "x".join(map(str, asked.size)),
        "--num-frames": asked.num_frames,
        "--steps": asked.steps,
    }
    given = [word for pair in options.items() if pair[1] is not None for word in map(str, pair)]
    lines = [
        f"{file}: {file.stat().st_size / 1e3:,.1f} kB",
        f"made for: {grid.frames} x {grid.height} x {grid.width} tokens{text}, {made.layers} "
        f"layers, {made.steps} steps",
        f"made from: prompts {len(made.prompts)}, seeds {len(made.seeds)}",
        f"density: {found.density:.3f}, the mean over all self-attention of a run with it",
        f"error of the latents on these prompts: {found.error:.2f} dB; with all weights 1 "
        f"{found.unweighted:.2f} dB",
    ]
    if target.psnr is not None:
        lines.append(f"PSNR on these prompts: {found.reached:.2f} dB")
    if target.speedup is not None:
        lines.append(f"denoising: {found.reached:.2f} times as fast as dense")
    use = shlex.join(["vdit-sparse", "generate", *given])
    return [*lines, f'use it with: {use} --prompt "..." --out DIR']
