"""Pictures of what a method visits in one run: `vdit-sparse inspect`."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vdit_sparse.app.environment import commit, machine, versions
from vdit_sparse.app.generate import RunFailed
from vdit_sparse.app.loading import opened
from vdit_sparse.app.options import InputError, RunChoice
from vdit_sparse.app.request import Request, parse_request
from vdit_sparse.app.terminal import Progress
from vdit_sparse.call import Call
from vdit_sparse.eval.denoise import execution_device
from vdit_sparse.eval.files import new_file
from vdit_sparse.eval.inspect import Inspection, heads_of, layers_of
from vdit_sparse.eval.inspect import inspect as look
from vdit_sparse.eval.inspect_page import as_data, page, pictures
from vdit_sparse.grid import Grid
from vdit_sparse.method import SparseAttention

# How many layers, heads and steps are shown where the caller does not say which.
LAYERS, HEADS, STEPS = 3, 2, 3
PAGE, DATA = "inspect.html", "inspect.json"
# Options of generate that this command has not.
NOT_ASKED = {"compare": None, "compile": False, "dense_backend": None, "command": None}
Numbers = tuple[int, ...] | None


@dataclass(frozen=True, kw_only=True)
class InspectRequest:
    """What the caller wants.

    model: which model is loaded, how, the settings of its call, the method (its only run), and the
    folder to write to. layers, heads: whose maps to show; steps: which to measure; an empty tuple
    for a few evenly apart, None for all.
    """

    model: Request
    layers: Numbers = ()
    heads: Numbers = ()
    steps: Numbers = ()

    @property
    def choice(self) -> RunChoice:
        """The method and its name."""
        return self.model.runs[0]


def parse_inspection(words: Mapping) -> InspectRequest:
    """The request of a command line, given as option -> text, number, list of texts or None.

    Raises InputError for a word that means nothing.
    """
    chosen = {name: parse_numbers(name, words[name]) for name in ("layers", "heads", "steps")}
    count = words["num_inference_steps"]
    if count is not None and count < 1:
        raise InputError(f"--num-inference-steps must be at least 1, got {count}.")
    request = parse_request({**words, **NOT_ASKED, "steps": count})
    if request.runs[0].method is None:
        raise InputError("--method dense visits everything: name a sparse method.")
    return InspectRequest(model=request, **chosen)


def parse_numbers(name: str, text: str | None) -> Numbers:
    """The numbers of "0,5,9" or "0-3,9"; None for "all"; an empty tuple for None."""
    if text in (None, "all"):
        return () if text is None else None
    numbers = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part)
        if not match or int(match[1]) > int(match[2] or match[1]):
            raise InputError(f"--{name} must be all or numbers such as 0,5 or 0-3, got {text!r}.")
        numbers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(dict.fromkeys(numbers))


def inspect(request: InspectRequest, progress: Progress) -> list[str]:
    """Runs the prompt, writes inspect.html, inspect.json and the PNGs into the folder, and returns
    lines that say what was found and where it is.

    Raises InputError for what the caller can put right, and RunFailed for a run that went wrong.
    """
    asked = request.model
    pipe, settings = opened(asked, progress)
    chosen = _chosen(pipe, request, settings)

    def on_step(done: int, total: int) -> None:
        progress("looking", done, total)

    text = {"negative_prompt": asked.negative_prompt} if asked.negative_prompt else {}
    inputs = {**settings, **text, **chosen, "on_step": on_step}
    try:
        found = look(pipe, request.choice.method, asked.prompt, asked.seed, **inputs)
    except ValueError as error:
        raise InputError(str(error)) from error
    except Exception as error:
        raise RunFailed(f"{type(error).__name__}: {error} (nothing was written)") from error
    files = _write(found, request, _facts(pipe, asked, settings))
    return [*_lines(found), *(str(asked.out / file) for file in files)]


def _chosen(pipe, request: InspectRequest, settings: dict) -> dict[str, Numbers]:
    """Layers, heads and steps; InputError for those that the model does not have."""
    layers, steps = layers_of(pipe), settings["num_inference_steps"]
    heads = heads_of(pipe) or HEADS
    sparse = sparse_steps(request.choice.method, layers, steps)
    chosen = {}
    for name, numbers, count, few in (
        ("layers", request.layers, layers, spread(range(layers), LAYERS)),
        ("heads", request.heads, heads, spread(range(heads), HEADS)),
        ("steps", request.steps, steps, spread(sparse or range(steps), STEPS)),
    ):
        if numbers and max(numbers) >= count:
            raise InputError(f"--{name} must be from 0 to {count - 1}, got {max(numbers)}.")
        chosen[name] = few if numbers == () else numbers
    return chosen


def sparse_steps(method: SparseAttention, layers: int, steps: int) -> list[int]:
    """The steps at which the middle layer does not run dense by a field of the method."""
    place = (Grid(1, 1, 1), layers // 2, layers)
    return [step for step in range(steps) if not method.is_dense(Call(*place, step, steps, {}))]


def spread(numbers: Sequence[int], count: int) -> tuple[int, ...]:
    """At most `count` of the numbers, evenly apart, first and last among them; one alone is the
    middle."""
    if count == 1:
        return (numbers[len(numbers) // 2],)
    last = len(numbers) - 1
    return tuple(dict.fromkeys(numbers[round(at * last / (count - 1))] for at in range(count)))


def _facts(pipe, request: Request, settings: dict) -> dict:
    transformer = pipe.transformer or pipe.transformer_2
    plain = {name: x for name, x in settings.items() if isinstance(x, int | float | str | None)}
    return {
        "negative_prompt": request.negative_prompt,
        "model": {
            "name": request.model or "bundled",
            "transformer": type(transformer).__name__,
            "dtype": str(transformer.dtype).removeprefix("torch."),
        },
        "settings": plain,
        "versions": versions(),
        "commit": commit(),
        "machine": machine(execution_device(pipe)),
    }


def _write(found: Inspection, request: InspectRequest, facts: dict) -> list[str]:
    """Writes all files, each whole or not at all, in place of what an earlier command left, and
    returns their names."""
    shown, out = pictures(found), request.model.out
    model, settings = facts["model"], facts["settings"]
    line = (
        f"{model['name']} ({model['transformer']}, {model['dtype']}), "
        f"{settings['height']} x {settings['width']} pixels, {settings['num_frames']} frames, "
        f"{found.steps} steps, guidance {settings['guidance_scale']:g}, on "
        f"{facts['machine'].get('gpu') or facts['machine']['processor']}"
    )
    names = [PAGE, DATA, *shown]
    data = json.dumps({**as_data(found, facts), "files": names}, indent=1, ensure_ascii=False)
    contents = {
        PAGE: page(found, shown, request.choice.label, line).encode(),
        DATA: f"{data}\n".encode(),
        **shown,
    }
    try:
        for file in _former(out):
            file.unlink(missing_ok=True)
        for name, content in contents.items():
            with new_file(out / name) as temporary:
                temporary.write_bytes(content)
    except OSError as error:
        raise InputError(f"Cannot write to --out {out} ({error.strerror}).") from error
    return names


def _former(out: Path) -> list[Path]:
    """The files that an earlier command left in the folder, as its inspect.json lists them."""
    try:
        names = json.loads((out / DATA).read_text())["files"]
        return [out / name for name in names if Path(name).name == name]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _lines(found: Inspection) -> list[str]:
    names = ("density", "recall", "best", "error")
    means = {name: found.table(name).nanmean((1, 2)).tolist() for name in names}
    return [
        f"step {step}: density {means['density'][at]:.3f}, recall {means['recall'][at]:.3f} (best "
        f"{means['best'][at]:.3f}), error {means['error'][at]:.3f}"
        for at, step in enumerate(found.measured)
    ]
