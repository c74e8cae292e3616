"""From words on the command line to values; what is wrong with them is said in one line."""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path

import torch

from vdit_sparse.calibration import read_header
from vdit_sparse.method import SparseAttention
from vdit_sparse.methods import METHODS
from vdit_sparse.tuned import TunedAttention

DENSE = "dense"
# What a run may use: the methods, and what `vdit-sparse tune` makes of them.
RUNNABLE = {**METHODS, "tuned": TunedAttention}
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
CHECKS = ("off", "warn", "strict")
# What processes under torchrun share.
PARALLELS = ("tokens", "guidance", "both")
OFFLOADS = ("none", "model", "sequential", "group")
DENSE_BACKENDS = ("native", "_native_cudnn", "flash", "_flash_3", "xformers", "sage")

_WORDS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


class InputError(Exception):
    """Something that the caller can put right: one line that says what to do, exit code 2."""


@dataclasses.dataclass(frozen=True)
class RunChoice:
    """What one run uses.

    name: "dense" or a name in `RUNNABLE`; method: None for dense; preset: where it came from.
    """

    name: str
    method: SparseAttention | None = None
    preset: str | None = None

    @property
    def label(self) -> str:
        """The name, and the fields that differ from the method's defaults; a file by its name, for
        a label is seen by whoever sees the video."""
        if self.method is None:
            return self.name
        values = {x.name: getattr(self.method, x.name) for x in dataclasses.fields(self.method)}
        if values.get("calibration") is not None:
            values["calibration"] = Path(values["calibration"]).name
        changed = [
            f"{field.name}={show_value(values[field.name])}"
            for field in dataclasses.fields(self.method)
            if values[field.name] != field.default
        ]
        return " ".join([self.preset or self.name, *([] if self.preset else changed)])


def parse_run(
    name: str | None, settings: Sequence[str] = (), preset: str | None = None
) -> RunChoice:
    """The run of `--method name --set ... --preset preset`. Without a name, that of the preset."""
    if preset is not None:
        method = _preset(preset)
        kind = method_name(method)
        if name not in (None, kind):
            raise InputError(f"Preset {preset!r} is of --method {kind}, but --method is {name}.")
        changed = with_settings(kind, type(method), settings, method)
        return RunChoice(kind, changed, preset if changed == method else None)
    name = name or next(iter(METHODS))
    if name == DENSE:
        if settings:
            raise InputError(f"--method dense has no fields, but --set {settings[0]} was given.")
        return RunChoice(DENSE)
    if name not in RUNNABLE:
        names = [DENSE, *RUNNABLE]
        raise InputError(
            f"There is no method {name!r}{hint(name, names)}; methods: {', '.join(names)}."
        )
    return RunChoice(name, with_settings(name, RUNNABLE[name], settings))


def parse_compare(text: str, option: str = "--compare") -> RunChoice:
    """The run of `--compare dense`, `METHOD`, `PRESET` or `METHOD:field=value,field=value`."""
    name, _, fields = text.partition(":")
    settings = re.split(r",(?=\w+=)", fields) if fields else []
    if name in (DENSE, *RUNNABLE):
        return parse_run(name, settings)
    if name in all_presets():
        return parse_run(None, settings, preset=name)
    names = [DENSE, *RUNNABLE, *all_presets()]
    raise InputError(
        f"{option} needs a method or preset, got {name!r}{hint(name, names)}; there are: "
        f"{', '.join(names)}."
    )


def all_presets() -> dict[str, SparseAttention]:
    """The presets of all model families by name."""
    return {
        name: method for group in presets_by_family().values() for name, method in group.items()
    }


def presets_by_family() -> dict[str, Mapping[str, SparseAttention]]:
    """Transformer class -> its presets. Imports diffusers, which takes seconds."""
    from vdit_sparse.pipelines.families import FAMILIES

    return {name: import_module(home).FAMILY.presets for name, home in FAMILIES.items()}


def method_name(method: SparseAttention) -> str:
    """The name of a method's class in `RUNNABLE`."""
    return next(name for name, kind in RUNNABLE.items() if type(method) is kind)


def parse_calibrated(file: str, name: str | None) -> str:
    """The name of the method that a calibration file is for; `name`, if given, must be it."""
    try:
        made_for = read_header(file)["method"]
    except (OSError, ValueError) as error:
        raise InputError(f"--calibration: {error}") from error
    found = next((key for key, kind in RUNNABLE.items() if kind.__name__ == made_for), None)
    if found is None or name not in (None, found):
        asked = f"--method is {name}" if found else "this version has no such method"
        raise InputError(f"--calibration {file} is for {found or made_for}, but {asked}.")
    return found


def with_settings(
    name: str,
    kind: type,
    settings: Sequence[str],
    base: object | None = None,
) -> object:
    """A dataclass of a method or search called `name`, with "field=value" in place of its defaults
    or of the fields of `base`."""
    fields = [field.name for field in dataclasses.fields(kind) if field.init]
    values = {}
    for setting in settings:
        field, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set must be field=value, got {setting!r}.")
        if field not in fields:
            raise InputError(
                f"Method {name} has no field {field!r}{hint(field, fields)}; fields: "
                f"{', '.join(fields)}."
            )
        values[field] = parse_field(kind, field, text)
    try:
        return kind(**values) if base is None else dataclasses.replace(base, **values)
    except (ValueError, TypeError) as error:
        raise InputError(f"Method {name}: {error}") from error


def parse_field(method: type, name: str, text: str) -> object:
    """The value of a dataclass's field, by the field's annotation: a truth value, an integer, a
    number, "none", a list of numbers "0,4,8", or the text itself."""
    annotation = typing.get_type_hints(method)[name]
    choices = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    for read in (_read_none, _read_bool, _read_int, _read_float, _read_ints, _read_text):
        value = read(choices, text)
        if value is not _NO:
            return value
    raise InputError(f"{name} must be {show_type(annotation)}, got {text!r}.")


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) in pixels from "256x448"."""
    match = re.fullmatch(r"(\d+)\s*[xX×]\s*(\d+)", text.strip())
    if not match:
        raise InputError(f"--size must be HEIGHTxWIDTH in pixels, such as 256x448, got {text!r}.")
    return int(match[1]), int(match[2])


def parse_lora(text: str) -> tuple[str, float]:
    """(id or path, weight) from "ID_OR_PATH" or "ID_OR_PATH:0.8"."""
    source, colon, weight = text.rpartition(":")
    try:
        source, weight = (source, float(weight)) if colon else (text, 1.0)
    except ValueError:
        source, weight = text, 1.0
    if not source or not math.isfinite(weight):
        raise InputError(f"--lora must be ID_OR_PATH or ID_OR_PATH:weight, got {text!r}.")
    looks_local = source.startswith((".", "/", "~")) or source.endswith(".safetensors")
    path = Path(source).expanduser()
    if looks_local and not path.exists():
        raise InputError(f"There is no LoRA file or folder {source}.")
    return (str(path) if path.exists() else source), weight


def parse_choice(option: str, text: str, choices: Iterable[str]) -> str:
    """The text, if it is one of the choices."""
    choices = list(choices)
    if text not in choices:
        raise InputError(
            f"{option} must be one of {', '.join(choices)}, got {text!r}{hint(text, choices)}."
        )
    return text


def hint(word: str, choices: Iterable[str]) -> str:
    """ " (did you mean ...?)", or nothing where no choice is near."""
    near = difflib.get_close_matches(word.lower(), list(choices), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def show_value(value: object) -> str:
    """A field's value as `--set` reads it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) + ("," if len(value) == 1 else "")
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def show_type(annotation: object) -> str:
    """An annotation in words."""
    if _is_union(annotation):
        return " or ".join(show_type(part) for part in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        return "a list of numbers (0,4,8)"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    return "none" if annotation is types.NoneType else names.get(annotation, str(annotation))


def _preset(name: str) -> SparseAttention:
    presets = all_presets()
    if name not in presets:
        raise InputError(
            f"There is no preset {name!r}{hint(name, presets)}; presets: {', '.join(presets)}."
        )
    return presets[name]


_NO = object()


def _is_union(annotation: object) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _read_none(choices: Sequence, text: str) -> object:
    return None if types.NoneType in choices and text.lower() == "none" else _NO


def _read_bool(choices: Sequence, text: str) -> object:
    return _WORDS.get(text.lower(), _NO) if bool in choices else _NO


def _read_int(choices: Sequence, text: str) -> object:
    return int(text) if int in choices and re.fullmatch(r"[+-]?\d+", text) else _NO


def _read_float(choices: Sequence, text: str) -> object:
    try:
        return float(text) if float in choices else _NO
    except ValueError:
        return _NO


def _read_ints(choices: Sequence, text: str) -> object:
    lists = any(typing.get_origin(choice) is tuple for choice in choices)
    number = r"\d+(\.\d+)?"
    if lists and re.fullmatch(rf"{number}(,{number})*,?", text):
        parts = [part for part in text.split(",") if part]
        return tuple(float(part) if "." in part else int(part) for part in parts)
    return _NO


def _read_text(choices: Sequence, text: str) -> object:
    return text if str in choices else _NO
