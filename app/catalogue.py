"""The methods and presets that there are, for `vdit-sparse methods`."""

import dataclasses
import inspect
import typing

from rich.console import Console
from rich.table import Table

from vdit_sparse.app.options import method_name, presets_by_family, show_type, show_value
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
        fields = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("--set field", "type", "default"):
            fields.add_column(column)
        for field in method["fields"]:
            fields.add_row(field["name"], field["type"], show_value(field["default"]))
        console.print(fields)
    for family, presets in content["presets"].items():
        console.print(f"\n[bold]Presets[/bold] of {family}")
        shown = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("--preset", "method", "fields that differ from the defaults"):
            shown.add_column(column)
        for name, preset in presets.items():
            changed = (f"{key}={show_value(value)}" for key, value in preset["changed"].items())
            shown.add_row(name, preset["method"], " ".join(changed))
        console.print(shown)


def _method(name: str, kind: type[SparseAttention]) -> dict:
    annotations = typing.get_type_hints(kind)
    return {
        "name": name,
        "class": kind.__name__,
        "description": first_sentence(inspect.getdoc(kind) or ""),
        "fields": [
            {
                "name": field.name,
                "type": show_type(annotations[field.name]),
                "default": None if field.default is dataclasses.MISSING else field.default,
            }
            for field in dataclasses.fields(kind)
        ],
    }


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
