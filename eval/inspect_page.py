"""An inspection as numbers, and as one HTML file that needs nothing beside it."""

import base64
import html
import io
import math
from collections.abc import Mapping

from PIL import Image
from torch import Tensor

from vdit_sparse.eval.inspect import TABLES, Inspection, Look
from vdit_sparse.eval.inspect_plot import density_picture, maps_picture, recall_picture
from vdit_sparse.eval.report_style import STYLE

SCHEMA = 1
WORST = 8
ABOUT = {
    "density": "kept share of key blocks",
    "recall": "mean over queries of the softmax weight in the visited blocks",
    "best": "the most that as many blocks a row could hold, in the plan's order",
    "error": "|out - dense| / |dense| of the call's own q, k and v",
}


def pictures(found: Inspection) -> dict[str, bytes]:
    """File name -> PNG."""
    maps = {f"maps-step-{step:02}.png": maps_picture(found, step) for step in found.measured}
    drawn = {"density.png": density_picture(found), "recall.png": recall_picture(found), **maps}
    return {name: _png(picture) for name, picture in drawn.items() if picture is not None}


def as_data(found: Inspection, facts: Mapping) -> dict:
    """What `inspect.json` holds; facts: about model, settings and machine. What was not measured is
    null."""
    grid = found.grid
    return {
        "schema": SCHEMA,
        "method": found.method,
        "prompt": found.prompt,
        "seed": found.seed,
        **facts,
        "grid": [grid.frames, grid.height, grid.width, grid.text],
        "layers": found.layers,
        "heads": found.heads,
        "steps": found.steps,
        "density_of_steps": {str(step): value for step, value in found.densities.items()},
        "measured_steps": list(found.measured),
        "dense": [
            {"step": look.step, "layer": look.layer, "why": look.why}
            for look in found.looks
            if look.why
        ],
        **{name: _nested(found.table(name)) for name in TABLES},
    }


def page(found: Inspection, shown: Mapping[str, bytes], label: str, facts: str) -> str:
    """The HTML file. shown: as `pictures` gives them; label: the method in a few words; facts: the
    model, settings and machine in a line."""
    title = f"What {label} visits"
    sections = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p class='facts'>“{html.escape(found.prompt)}”, seed {found.seed}; "
        f"{html.escape(facts)}</p>",
        "<h2>Measured steps</h2>",
        _steps(found),
        "".join(
            f"<p class='note'>{name}: {html.escape(said)}.</p>" for name, said in ABOUT.items()
        ),
        "<h2>Density over steps</h2>",
        _figure("density.png", shown, "Mean density of each step."),
        "<h2>Recall per layer and head</h2>",
        _figure("recall.png", shown, "Recall of each layer and head at the measured steps."),
        _worst(found),
        "<h2>Visited blocks and exact mass</h2>",
        *(_figure(name, shown, name) for name in shown if name.startswith("maps")),
        f"<details><summary>Method</summary><pre>{html.escape(found.method)}</pre></details>",
    ]
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}"
        "</title><meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<style>{STYLE}</style></head><body><main>{''.join(sections)}</main></body></html>\n"
    )


def _steps(found: Inspection) -> str:
    titles = ["step", "dense layers", *ABOUT, "lowest recall"]
    rows = []
    for index, step in enumerate(found.measured):
        dense = sum(look.why is not None for look in found.looks if look.step == step)
        tables = {name: found.table(name)[index] for name in ABOUT}
        means = [f"{float(table.nanmean()):.3f}" for table in tables.values()]
        lowest = tables["recall"].nan_to_num(math.inf).min()
        rows.append([str(step), f"{dense} of {found.layers}", *means, f"{float(lowest):.3f}"])
    return _table(titles, rows)


def _worst(found: Inspection) -> str:
    """The heads that miss most, of all measured steps."""
    places = [
        (float(look.recall[head]), look, head)
        for look in found.looks
        if look.why is None
        for head in range(len(look.recall))
    ]
    lowest = sorted(places, key=lambda place: place[0])[:WORST]
    if not lowest:
        return ""
    titles = ["step", "layer", "head", *ABOUT]
    rows = [_row(look, head) for _, look, head in lowest]
    return f"<h3>The {len(rows)} lowest</h3>{_table(titles, rows)}"


def _row(look: Look, head: int) -> list[str]:
    values = [f"{float(getattr(look, name)[head]):.3f}" for name in ABOUT]
    return [str(look.step), str(look.layer), str(head), *values]


def _table(titles: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    table = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f"<div class='wide'><table>{table}</table></div>"


def _figure(name: str, shown: Mapping[str, bytes], about: str) -> str:
    data = base64.b64encode(shown[name]).decode()
    return f"<figure><img src='data:image/png;base64,{data}' alt='{html.escape(about)}'></figure>"


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def _nested(table: Tensor) -> list:
    """A table as lists, rounded to six digits, null for NaN."""
    if table.ndim:
        return [_nested(part) for part in table]
    value = float(table)
    return None if math.isnan(value) else round(value, 6)
