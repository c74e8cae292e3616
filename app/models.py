"""The model families and their published checkpoints: for `vdit-sparse models`, the README and
docs/models.md.

`python -m vdit_sparse.app.models` writes both tables between their markers; --check only says
whether they are up to date.
"""

import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vdit_sparse.pipelines.checkpoints import Checkpoint, checkpoints

COMMAND = "python -m vdit_sparse.app.models"
BEGIN, END = f"<!-- models: written by {COMMAND} -->", "<!-- models: end -->"
HUB = "https://huggingface.co"
# Transformer class -> what people call the family, in the order of the tables.
TITLES = {
    "WanTransformer3DModel": "Wan 2.1, 2.2",
    "WanVACETransformer3DModel": "Wan VACE",
    "SkyReelsV2Transformer3DModel": "SkyReels-V2",
    "HunyuanVideoTransformer3DModel": "HunyuanVideo",
    "HunyuanVideo15Transformer3DModel": "HunyuanVideo 1.5",
    "CogVideoXTransformer3DModel": "CogVideoX, 1.5",
    "MochiTransformer3DModel": "Mochi",
    "LTXVideoTransformer3DModel": "LTX-Video",
    "LTX2VideoTransformer3DModel": "LTX-2",
    "AllegroTransformer3DModel": "Allegro",
    "CosmosTransformer3DModel": "Cosmos 1, 2, 2.5",
    "Kandinsky5Transformer3DModel": "Kandinsky 5",
    "FluxTransformer2DModel": "FLUX.1",
    "Flux2Transformer2DModel": "FLUX.2",
    "ChromaTransformer2DModel": "Chroma",
    "QwenImageTransformer2DModel": "Qwen-Image",
    "SD3Transformer2DModel": "Stable Diffusion 3, 3.5",
    "PixArtTransformer2DModel": "PixArt alpha, Sigma",
    "HunyuanDiT2DModel": "HunyuanDiT",
    "ZImageTransformer2DModel": "Z-Image",
    "HiDreamImageTransformer2DModel": "HiDream",
}


def families() -> dict[str, tuple[Checkpoint, ...]]:
    """Transformer class of each family that is supported -> its checkpoints in the table."""
    from vdit_sparse.pipelines.families import FAMILIES

    order = [*(kind for kind in TITLES if kind in FAMILIES), *sorted(set(FAMILIES) - set(TITLES))]
    return {kind: tuple(one for one in checkpoints() if one.transformer == kind) for kind in order}


def as_data() -> dict:
    """The table as plain data."""
    return {
        kind: [asdict(replace(one, config={})) | {"config": dict(one.config)} for one in found]
        for kind, found in families().items()
    }


def show(console: Console) -> None:
    """Prints all checkpoints."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("--model", no_wrap=True)
    for column in ("hub id", "parameters", "meant for", "presets"):
        table.add_column(column, overflow="fold")
    for found in families().values():
        for one in found:
            table.add_row(one.name, one.hub, _weight(one), _use(one), " ".join(one.presets))
    console.print(table, highlight=False)


def short_table() -> str:
    """A row a family, for the README."""
    presets = _presets()
    lines = ["| model | checkpoints | presets |", "|---|---|---|"]
    for kind, found in families().items():
        names = ", ".join(f"[{one.name}]({HUB}/{one.hub}) ({_weight(one)})" for one in found)
        mine = ", ".join(f"`{name}`" for name in presets[kind] if "-mini" not in name)
        lines.append(f"| {TITLES.get(kind, kind)} | {names or 'none listed'} | {mine} |")
    return "\n".join(lines)


def long_table() -> str:
    """A row a checkpoint, for docs/models.md."""
    lines = [
        "| name | hub id | pipeline | parameters | self-attention | meant for | tokens | presets |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in families().values():
        for one in found:
            layers = f"{one.layers} x {one.heads} x {one.head_dim}"
            grid = one.grid(*one.size, one.frames)
            text = f" + {grid.text}" if grid.text else ""
            presets = ", ".join(f"`{name}`" for name in one.presets)
            cells = (
                f"`{one.name}`",
                f"[{one.hub}]({HUB}/{one.hub})",
                f"`{one.pipeline}`",
                _weight(one),
                layers,
                _use(one),
                f"{grid.video:,}{text}",
                presets,
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# File below the root of a checkout -> its table.
TABLES = {"README.md": short_table, "docs/models.md": long_table}


def stale(root: Path, write: bool = False) -> list[str]:
    """Names of the files below `root` whose table is not what it would be now; `write` puts it
    there. Raises ValueError for a file without both markers."""
    found = []
    for name, table in TABLES.items():
        text = (root / name).read_text()
        before, begin, rest = text.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not (begin and end):
            raise ValueError(f"{name} needs the lines {BEGIN!r} and {END!r} around its table.")
        wanted = f"{before}{BEGIN}\n{table()}\n{END}{after}"
        if wanted != text:
            found.append(name)
            if write:
                (root / name).write_text(wanted)
    return found


def _presets() -> Mapping[str, Mapping]:
    from vdit_sparse.app.options import presets_by_family

    return presets_by_family()


def _weight(one: Checkpoint) -> str:
    return f"{one.experts} x {one.billions:g} B" if one.experts > 1 else f"{one.billions:g} B"


def _use(one: Checkpoint) -> str:
    size = f"{one.size[0]}x{one.size[1]}"
    frames = "" if one.image else f", {one.frames} frames"
    return f"{size}{frames}, {one.steps} steps"


def main(arguments: list[str]) -> int:
    """Writes the tables of this checkout, or checks them; exit code 1 if a checked one is stale."""
    root = Path(__file__).parent.parent
    check = arguments == ["--check"]
    found = stale(root, write=not check)
    for name in found:
        print(f"{name}: {f'stale, run {COMMAND}' if check else 'written'}")
    return int(check and bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
