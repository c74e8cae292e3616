"""The model card's figures: filled in from reports, never by hand.

A place in the card is what stands between `<!-- NAME -->` and `<!-- end NAME -->`; a report is a
file `NAME.json` that `reports.write_report` or `eval.adherence` wrote. `run.json` says with which
`commit` the reports of a folder were made where there was no git.
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path

NOT_MEASURED = "Not measured for these weights."
RUN = "run.json"
# Places whose figures do not depend on the transformer -> what they depend on.
_ABOUT = {"autoencoder": "vae", "size": None}
_PLACE = re.compile(r"<!-- (?!end )([\w-]+) -->\n(.*?)<!-- end \1 -->", re.DOTALL)


def read_reports(folder: Path) -> dict[str, dict]:
    """Name -> report, of all files `NAME.json`, and below folders `NAME/ANY.json`; one without a
    commit has that of `run.json`."""
    run = folder / RUN
    commit = json.loads(run.read_text())["commit"] if run.is_file() else "unknown"
    found = {}
    for file in sorted(folder.rglob("*.json")):
        if file == run:
            continue
        name = file.stem if file.parent == folder else file.parent.name
        content = json.loads(file.read_text())
        if content.get("commit", "unknown") == "unknown":
            content["commit"] = commit
        found[name] = content
    return found


def fill(card: str, reports: Mapping[str, Mapping], changed: Collection[str]) -> str:
    """The card with each report in its place. Places without one stay as they are, or say that
    nothing was measured if what they are about has `changed`: the transformer, or for the place
    `autoencoder` the vae; the place `size` always stays.

    Raises ValueError for a report without a place, for it would be lost.
    """
    places = {match[1] for match in _PLACE.finditer(card)}
    lost = sorted(set(reports) - places)
    if lost:
        raise ValueError(
            f"Expected a place in the card for each report, found none for {', '.join(lost)}: "
            f"write `<!-- {lost[0]} -->` and `<!-- end {lost[0]} -->` where it belongs."
        )

    def filled(match: re.Match) -> str:
        name, body = match[1], match[2]
        if name in reports:
            body = section(reports[name])
        elif _ABOUT.get(name, "transformer") in changed:
            body = NOT_MEASURED + "\n"
        return f"<!-- {name} -->\n{body}<!-- end {name} -->"

    return _PLACE.sub(filled, card)


def section(content: Mapping) -> str:
    """A report as Markdown: its tables, then machine, versions, commit and command."""
    text = content["markdown"].rstrip() + "\n"
    if "machine" not in content:
        return text
    versions = ", ".join(f"{name} {content[name]}" for name in ("torch", "triton"))
    return (
        f"{text}\n{content['machine']}, {versions}, commit `{content['commit']}`: "
        f"`{content['command']}`\n"
    )


def size_table(model: Path) -> str:
    """Markdown: MB (millions of bytes) of each part of the model's folder, and of all."""
    sizes = {}
    for file in sorted(model.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            part = file.relative_to(model).parts[0]
            sizes[part] = sizes.get(part, 0) + file.stat().st_size
    rows = [*sizes.items(), ("all", sum(sizes.values()))]
    lines = ["| part | MB |", "|---|---|", *(f"| {name} | {n / 1e6:.2f} |" for name, n in rows)]
    return "\n".join(lines)
