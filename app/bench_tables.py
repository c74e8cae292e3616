"""What the bench commands print: tables, and what their figures were measured on."""

from pathlib import Path

from vdit_sparse.app.bench_model import ModelBench, Row
from vdit_sparse.app.environment import commit, machine, versions
from vdit_sparse.app.options import InputError
from vdit_sparse.kernels.bench.report import roofline, table

MODEL_COLUMNS = (
    "variant",
    "ms",
    "attention",
    "share",
    "plan",
    "reorder",
    "density",
    "GiB",
    "speed-up",
    "bound",
)


def facts_of(device, dtype) -> dict[str, object]:
    """Machine, versions and commit beside every figure."""
    known = versions()
    place = machine(device)
    return {
        "machine": place.get("gpu") or f"{place['processor']}, {place['threads']} threads",
        **{name: known[name] for name in ("torch", "triton", "diffusers")},
        "commit": (commit() or "no checkout")[:10] + ("+changes" if _changed() else ""),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _changed() -> bool:
    return (commit() or "").endswith("+changes")


def model_facts(name: str, bench: ModelBench) -> dict[str, object]:
    """`facts_of`, and the sizes of the measured model."""
    height, width, frames = bench.video
    return facts_of(bench.device, bench.dtype) | {
        "model": name,
        "size": f"{height}x{width}x{frames}",
        "tokens": bench.grid.tokens,
        "layers": bench.layers,
        "of": bench.size.layers,
        "block": bench.block,
    }


def model_table(rows: list[Row], bench: ModelBench, facts: dict) -> str:
    """The rows as text; milliseconds are of the measured layers."""
    cells = [MODEL_COLUMNS, *(_model_cells(row) for row in rows)]
    notes = [f"{row.name}: {row.error}" for row in rows if row.error]
    about = ", ".join(f"{name} {value}" for name, value in facts.items())
    scale = bench.size.layers / bench.layers
    best = min((row.ms for row in rows if row.dense and row.ms is not None), default=None)
    whole = "" if best is None else f"; the fastest dense one of all layers {best * scale:.0f} ms"
    said = f"milliseconds a forward of {bench.layers} of {bench.size.layers} layers{whole}"
    return "\n".join([about, said, *aligned(cells), *notes])


def _model_cells(row: Row) -> tuple[str, ...]:
    share = None if row.attention is None or row.ms is None else row.attention / row.ms
    return (
        row.name,
        show(row.ms, ".1f"),
        show(row.attention, ".1f"),
        show(share, ".0%"),
        show(row.plan, ".2f"),
        show(row.reorder, ".2f"),
        show(row.density, ".3f"),
        show(row.memory, ".1f"),
        show(row.speedup, ".2f"),
        show(row.bound, ".2f"),
    )


def show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def aligned(cells: list[tuple[str, ...]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def kernel_lines(rows: list[dict]) -> list[str]:
    """Kernels of one shape as text."""
    first = rows[0]
    about = f"{first['shape']}: {first['tokens']} tokens, {first['heads']} heads of {first['dim']}"
    return [about, *table(rows)]


def write_roofline(path: Path | None, rows: list[dict], machine: str) -> None:
    """A roofline, if one is asked for. Raises InputError without matplotlib."""
    if path is None:
        return
    try:
        roofline(rows, machine, path)
    except ModuleNotFoundError as error:
        raise InputError(
            f"--png needs matplotlib: pip install 'vdit-sparse[eval]' ({error})."
        ) from error
