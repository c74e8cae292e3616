"""The methods as the page's forms show them: each field of the dataclass with its control, range
and help, the last from the docstring."""

import dataclasses
import inspect
import re
import typing

from vdit_sparse.app.catalogue import first_sentence, source
from vdit_sparse.app.options import RUNNABLE, all_presets, method_name, show_type, show_value
from vdit_sparse.calibration import CalibratedAttention
from vdit_sparse.kernels.block_mask import BLOCK_SIZES
from vdit_sparse.kernels.block_sparse import BACKENDS, PRECISIONS
from vdit_sparse.method import SparseAttention

# Fields that take one of few words.
CHOICES = {
    "align": ("straddle", "released"),
    "backend": ("none", *BACKENDS),
    "block": tuple(map(str, BLOCK_SIZES)),
    "d1": ("full", "half"),
    "mask": ("block", "tile", "token"),
    "per": ("row", "head"),
    "precision": PRECISIONS,
    "ratio": ("lse", "off"),
    "recall_eval": ("up", "base"),
    "residual_dtype": ("bf16", "fp8", "int8", "same"),
    "select": ("exact", "released"),
}
# Lowest, highest and step of a slider; what lies outside can be had from the command line.
RANGES = {
    "decay": (0.05, 2.0, 0.05),
    "dense_layers": (0, 12, 1),
    "dense_steps": (0, 30, 1),
    "density": (0.05, 0.65, 0.01),
    "last_dense_layers": (0, 12, 1),
    "last_dense_steps": (0, 30, 1),
    "ramp": (0.0, 0.2, 0.01),
    "random_share": (0.0, 0.2, 0.01),
    "recall_threshold": (0.5, 1.0, 0.01),
    "sink_frames": (0, 8, 1),
}
# Those that most people leave as they are.
RARE = {
    "align", "backend", "cache_lse", "clamp", "decimate", "dense_search", "first_frame_sink",
    "force_diagonal", "intra_frame", "last_dense_layers", "last_dense_steps", "mask", "offload",
    "per", "pool", "precision", "random_share", "ratio", "recall_eval", "residual_dtype", "select",
}  # fmt: skip
# Files come by upload, never by a path.
HIDDEN = {"calibration"}


def methods() -> list[dict]:
    """Every method with its fields, as plain data for the page."""
    return [
        {
            "name": name,
            "title": kind.__name__.removesuffix("Attention"),
            "about": first_sentence(inspect.getdoc(kind) or ""),
            "source": source(inspect.getdoc(kind) or ""),
            "calibrated": issubclass(kind, CalibratedAttention),
            "fields": _fields(kind),
        }
        for name, kind in RUNNABLE.items()
    ]


def presets() -> dict[str, dict]:
    """Every preset: its method, and all its fields as text."""
    return {
        name: {
            "method": method_name(method),
            "fields": {
                field.name: show_value(getattr(method, field.name))
                for field in dataclasses.fields(method)
                if field.name not in HIDDEN
            },
        }
        for name, method in all_presets().items()
    }


def _fields(kind: type[SparseAttention]) -> list[dict]:
    annotations = typing.get_type_hints(kind)
    said = help_of(kind)
    shown = [field for field in dataclasses.fields(kind) if field.name not in HIDDEN]
    # The method's own fields come first, then those that all have.
    shared = {field.name for field in dataclasses.fields(SparseAttention)}
    shown.sort(key=lambda field: field.name in shared)
    return [
        {
            "name": field.name,
            "default": show_value(field.default),
            "help": said.get(field.name, ""),
            "rare": field.name in RARE,
            **_control(field, annotations[field.name]),
        }
        for field in shown
    ]


def _control(field: dataclasses.Field, annotation: object) -> dict:
    """How the page lets a field be set: a switch, a choice, a slider or a line of text."""
    if isinstance(field.default, bool):
        return {"kind": "switch"}
    if field.name in CHOICES:
        words = CHOICES[field.name]
        optional = field.default is None and "none" not in words
        return {"kind": "choice", "choices": [*(["none"] if optional else []), *words]}
    if field.name in RANGES:
        low, high, step = RANGES[field.name]
        return {"kind": "slider", "low": low, "high": high, "step": step}
    return {"kind": "text", "hint": show_type(annotation)}


def help_of(kind: type) -> dict[str, str]:
    """Field -> what the docstring of the class or of a base says of it, those of a base last.

    A docstring has paragraphs of "name: text" and "name, name: text", continued by deeper lines.
    """
    found: dict[str, str] = {}
    for each in kind.__mro__:
        if not dataclasses.is_dataclass(each):
            continue
        names = {field.name for field in dataclasses.fields(each)}
        for entry in re.split(r"\n(?=\S)", inspect.cleandoc(each.__doc__ or "")):
            match = re.match(r"((?:\w+(?:, )?)+): (.*)", " ".join(entry.split()))
            for name in match[1].split(", ") if match else ():
                if name in names:
                    found.setdefault(name, match[2])
    return found
