"""Calibration files: what an offline search found for one model, size and number of steps, with
text of any length. A file is safetensors with a JSON header; nothing is unpickled. Tensors are
"<expert>.<name>".
"""

import json
import os
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vdit_sparse.call import Call, Origin
from vdit_sparse.grid import Grid
from vdit_sparse.method import SparseAttention

FORMAT = 1
HEADER = "vdit_sparse"
# What a header holds, and the type of each entry.
ENTRIES = {
    "format": int,
    "method": str,
    "fields": dict,
    "origin": dict,
    "grid": list,
    "layers": int,
    "steps": int,
    "prompts": list,
    "seeds": list,
    "versions": dict,
}


@dataclass(frozen=True, eq=False)
class Calibration:
    """A calibration file in memory.

    method: class name of the method; fields: of its search; origin: the model that was searched;
    grid, layers, steps: of the searched runs, the grid as video alone (the text in some files of
    earlier versions only says how large their masks are); prompts, seeds: what was generated;
    versions: of the packages that did it (None: not there); tensors: what was found, on the CPU.
    """

    path: str
    method: str
    fields: Mapping
    origin: Origin
    grid: Grid
    layers: int
    steps: int
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    versions: Mapping[str, str | None]
    tensors: Mapping[str, Tensor]

    def tensor(self, name: str, expert: str) -> Tensor:
        """What was found for an expert. Raises ValueError if it was not searched."""
        found = self.tensors.get(f"{expert}.{name}")
        if found is None:
            experts = sorted({key.split(".")[0] for key in self.tensors})
            raise ValueError(
                f"{self.path} has no {name!r} of {expert!r}, only of {', '.join(experts)}: "
                "calibrate this model again."
            )
        return found

    def step_of(self, call: Call) -> int:
        """The searched step nearest to the share of the run that the call's step is at, the first
        step being 0 and the last 1; the even one of two as near. Where the call's number of steps
        is unknown, the step of the same number, or the last."""
        if call.steps in (None, self.steps):
            return min(call.step, self.steps - 1)
        share = call.step / max(call.steps - 1, 1)
        return round(share * (self.steps - 1))

    def check(self, method: str, call: Call) -> None:
        """Raises ValueError if this file is for another method, video size or configuration than
        those of `call`; warns (`CalibrationWarning`) if only model, scheduler or steps differ."""
        origin, mine, run = call.origin, *(replace(x.grid, text=0) for x in (self, call))
        wrong = _differences(
            ("method", self.method, method),
            ("grid", mine, run),
            ("layers", self.layers, call.layers),
            ("model configuration", self.origin.config, origin.config),
        )
        if wrong:
            raise ValueError(
                f"{self.path} was made for something else: {wrong}. Calibrate for this one."
            )
        doubtful = _differences(
            ("model", self.origin.model, origin.model),
            ("scheduler", self.origin.scheduler, origin.scheduler),
            ("number of steps", self.steps, call.steps),
        )
        if doubtful:
            warnings.warn(
                f"{self.path} was searched otherwise: {doubtful}. Steps are matched by their share "
                "of the run; a calibration of its own may do better.",
                CalibrationWarning,
                stacklevel=2,
            )


class CalibrationWarning(UserWarning):
    """A calibration is used in a run that differs from the searched one."""


@dataclass(frozen=True, kw_only=True)
class CalibratedAttention(SparseAttention):
    """Base of the methods that need a calibration file.

    calibration: the file, or a folder of files of which that for the method and video size is taken
        (of several, that for the model's configuration, then for the number of steps; what is still
        open raises); None: those that come with the checkpoint, in its folder `calibrations`.
    block: None for the file's; another one than the file's raises.
    """

    calibration: str | None = None
    block: int | None = None

    def calibrated(self, call: Call) -> Calibration:
        """The calibration for this call, checked once a run against all that the call says.

        Raises ValueError where there is none, or it is of another method, grid, configuration or
        block; warns where model, scheduler or number of steps differ.
        """
        if "calibration" not in call.memory:
            call.memory["calibration"] = self._find(call)
        call.note.calibration = call.memory["calibration"].path
        return call.memory["calibration"]

    def _find(self, call: Call) -> Calibration:
        source = self.calibration or call.origin.calibrations
        name = type(self).__name__
        if not source:
            raise ValueError(
                f"{name} needs a calibration for this model and size: make one with `vdit-sparse "
                "calibrate` and pass calibration=FILE."
            )
        path = _choose(source, name, call)
        found = _loaded(str(path), _changed(path))
        found.check(name, call)
        if self.block not in (None, found.fields["block"]):
            raise ValueError(
                f"{found.path} was searched with block={found.fields['block']}, but {name} has "
                f"block={self.block}: leave `block` out, or calibrate again."
            )
        return found


def save(calibration: Calibration) -> None:
    """Writes a calibration to its path, at once: a run that dies leaves no half of a file."""
    content = {each.name: getattr(calibration, each.name) for each in fields(calibration)}
    path, tensors = Path(content.pop("path")), content.pop("tensors")
    for name in ("fields", "versions"):
        content[name] = dict(content[name])
    grid = calibration.grid
    content["grid"] = [grid.frames, grid.height, grid.width, grid.text]
    content["origin"] = asdict(calibration.origin)
    content["format"] = FORMAT
    header = {HEADER: json.dumps(content)}
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.half")
    try:
        save_file(_apart(tensors), half, header)
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: contiguous, on the CPU, none sharing memory."""
    ready = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    homes = Counter(tensor.untyped_storage().data_ptr() for tensor in ready.values())
    return {
        name: tensor.clone() if homes[tensor.untyped_storage().data_ptr()] > 1 else tensor
        for name, tensor in ready.items()
    }


def load(path: str | Path) -> Calibration:
    """Reads a calibration file. Raises FileNotFoundError, and ValueError for a file that is cut
    off, of another kind, or of a format that this version does not know."""
    header = read_header(path)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): calibrate again.") from error
    values = {name: header[name] for name in ENTRIES if name != "format"}
    values["grid"] = Grid(*values["grid"])
    values["origin"] = Origin(**values["origin"])
    values["prompts"], values["seeds"] = tuple(values["prompts"]), tuple(values["seeds"])
    return Calibration(path=str(path), tensors=tensors, **values)


def read_header(path: str | Path) -> dict:
    """The header of a calibration file; raises as `load` does."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no calibration file {path}.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        header = json.loads(metadata[HEADER])
        version = header["format"]
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is no calibration file, or is cut off ({type(error).__name__}: {error}): "
            "make one with `vdit-sparse calibrate`."
        ) from error
    if version != FORMAT:
        raise ValueError(f"{path} has format {version!r}, this version reads {FORMAT}.")
    bad = _bad_entries(header)
    if bad:
        raise ValueError(
            f"{path} is no whole calibration file: {', '.join(bad)} missing or wrong. Make one "
            "with `vdit-sparse calibrate`."
        )
    return header


def _bad_entries(header: dict) -> list[str]:
    """The entries that are missing, or are not what they should be."""
    bad = [name for name, kind in ENTRIES.items() if type(header.get(name)) is not kind]
    checks = {
        "fields": lambda given: type(given.get("block")) is int,
        "origin": lambda given: (
            given.keys() == asdict(Origin()).keys() and _all(str, [*given.values()])
        ),
        "grid": lambda given: (
            len(given) == 4 and _all(int, given) and min(given[:3]) > 0 <= given[3]
        ),
        "layers": lambda given: given > 0,
        "steps": lambda given: given > 0,
        "prompts": lambda given: _all(str, given),
        "seeds": lambda given: _all(int, given),
    }
    return bad or [name for name, check in checks.items() if not check(header[name])]


def _all(kind: type, values: list) -> bool:
    return all(type(value) is kind for value in values)


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns if path.is_file() else 0


@lru_cache(maxsize=8)
def _loaded(path: str, changed: int) -> Calibration:
    # It outlives the inference mode of whoever asked first.
    with torch.inference_mode(False):
        return load(path)


@lru_cache(maxsize=64)
def _header(path: Path, changed: int) -> dict:
    return read_header(path)


def _choose(source: str, method: str, call: Call) -> Path:
    """`source` itself, or of a folder the file for this method and video size."""
    path = Path(source)
    if not path.is_dir():
        return path
    headers = {file: _header(file, _changed(file)) for file in sorted(path.glob("*.safetensors"))}
    mine = {file: header for file, header in headers.items() if header["method"] == method}
    wanted = [call.grid.frames, call.grid.height, call.grid.width]
    fitting = {file: h for file, h in mine.items() if h["grid"][:3] == wanted}
    if not fitting:
        there = ", ".join(sorted({str(header["grid"][:3]) for header in mine.values()})) or "none"
        raise ValueError(
            f"{source} has no calibration of {method} for the token grid {wanted} (it has "
            f"{there}): make one with `vdit-sparse calibrate`, or use a size that it has."
        )
    own = {file: h for file, h in fitting.items() if h["origin"]["config"] == call.origin.config}
    fitting = own or fitting
    fitting = [f for f, h in fitting.items() if h["steps"] == call.steps] or list(fitting)
    if len(fitting) > 1:
        raise ValueError(
            f"{source} has {len(fitting)} calibrations of {method} for the token grid {wanted}: "
            f"{', '.join(file.name for file in fitting)}. Pass one of them as calibration=FILE."
        )
    return fitting[0]


def _differences(*compared: tuple[str, object, object]) -> str:
    """(what, in the file, in the run) that differ, in words; what is unknown does not."""
    unknown = ("", None)
    return "; ".join(
        f"{what} of the file {file}, of this run {run}"
        for what, file, run in compared
        if file != run and file not in unknown and run not in unknown
    )
