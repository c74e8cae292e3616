"""The methods and presets that there are, for `vdit-sparse methods`."""

import dataclasses
import inspect
import re
import typing

from rich.console import Console
from rich.table import Table

from vdit_sparse.app.options import method_name, presets_by_family, show_type, show_value
from vdit_sparse.calibration import CalibratedAttention
from vdit_sparse.eval.calibrators import CALIBRATORS
from vdit_sparse.method import SparseAttention
from vdit_sparse.methods import METHODS


def catalogue() -> dict:
    """Methods with their fields, and presets by model family, as plain data."""
    return {
        "methods": [_method(name, kind) for name, kind in METHODS.items()],
        "presets": {
            family: {name: _preset(method) for name, method in presets.items()}
            for family, presets in presets_by_family().items()
        },
    }


def show(content: dict, console: Console) -> None:
    """Prints a catalogue as tables."""
    for method in content["methods"]:
        console.print(f"\n[bold]{method['name']}[/bold]  {method['class']}")
        console.print(method["description"], highlight=False)
        if method["source"]:
            console.print(f"source: {method['source']}", highlight=False)
        if method["calibrated"]:
            command = f"vdit-sparse calibrate --method {method['name']}"
            console.print(f"needs a calibration of the model and size: {command}", highlight=False)
        console.print(_table("--set field", method["fields"]))
        if method["search"]:
            console.print(_table("calibrate --set field", method["search"]))
    for family, presets in content["presets"].items():
        console.print(f"\n[bold]Presets[/bold] of {family}")
        shown = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("--preset", "method", "fields that differ from the defaults"):
            shown.add_column(column)
        for name, preset in presets.items():
            changed = (f"{key}={show_value(value)}" for key, value in preset["changed"].items())
            shown.add_row(name, preset["method"], " ".join(changed))
        console.print(shown)


def _table(heading: str, fields: list[dict]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in (heading, "type", "default"):
        table.add_column(column)
    for field in fields:
        table.add_row(field["name"], field["type"], show_value(field["default"]))
    return table


def _method(name: str, kind: type[SparseAttention]) -> dict:
    text = inspect.getdoc(kind) or ""
    return {
        "name": name,
        "class": kind.__name__,
        "description": first_sentence(text),
        "source": source(text),
        "calibrated": issubclass(kind, CalibratedAttention),
        "fields": _fields(kind),
        "search": _fields(CALIBRATORS[name]) if name in CALIBRATORS else [],
    }


def _fields(kind: type) -> list[dict]:
    annotations = typing.get_type_hints(kind)
    return [
        {
            "name": field.name,
            "type": show_type(annotations[field.name]),
            "default": None if field.default is dataclasses.MISSING else field.default,
        }
        for field in dataclasses.fields(kind)
    ]


def _preset(method: SparseAttention) -> dict:
    changed = {
        field.name: getattr(method, field.name)
        for field in dataclasses.fields(method)
        if getattr(method, field.name) != field.default
    }
    return {
        "method": method_name(method),
        "fields": dataclasses.asdict(method),
        "changed": changed,
    }


def first_sentence(text: str) -> str:
    """The first sentence of a docstring, on one line."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return paragraph.split(". ")[0].rstrip(".") + "."


def source(text: str) -> str | None:
    """The paper that a docstring names after "Source:", as "title, arXiv number"; None if none."""
    found = re.search(r"Source: (.+?, arXiv \d{4}\.\d{4,5})", " ".join(text.split()))
    return found and found[1]
