"""`vdit-sparse bench kernels | model`: how fast attention and whole forwards are on this machine.

Only the standard library and typer are imported here, as in `cli.py`.
"""

import csv
from pathlib import Path
from typing import Annotated

import typer

from vdit_sparse.app.terminal import complain, errors

bench = typer.Typer(no_args_is_help=True, help="Measure attention kernels, or a model's forward.")

Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and library warnings.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1; default a GPU if any.")]
Dtype = Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; default bf16, fp32 on a CPU.")]
Block = Annotated[int, typer.Option(help="Tokens of a block: 64 or 128.")]
Csv = Annotated[Path | None, typer.Option("--csv", help="Append the rows here.", metavar="FILE")]
Methods = Annotated[
    list[str] | None, typer.Option("--method", help="A method; repeatable; default all.")
]

Seconds = Annotated[float | None, typer.Option(help="Begin no kernel after so many.")]


@bench.command()
def model(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="wan2.1-14b, wan2.1-1.3b or hunyuanvideo.")],
    size: Annotated[str, typer.Option(help="Pixels.", metavar="HxW")] = "720x1280",
    frames: Annotated[int, typer.Option(help="Frames of the video.")] = 81,
    layers: Annotated[int | None, typer.Option(help="How many to measure; default all.")] = None,
    method: Methods = None,
    precision: Annotated[
        list[str] | None, typer.Option(help="bf16, int8_bf16 or int8_fp8; repeatable.")
    ] = None,
    density: Annotated[float, typer.Option(help="Kept share of the blocks, 0 to 1.")] = 0.25,
    block: Block = 128,
    dense: Annotated[
        list[str] | None,
        typer.Option(help="A dense backend of diffusers; repeatable; default cuDNN's on a GPU."),
    ] = None,
    compile: Annotated[bool, typer.Option(help="Measure compiled blocks too.")] = True,
    rounds: Annotated[int, typer.Option(help="Forwards that count.")] = 3,
    kernels: Annotated[int, typer.Option(help="Name so many of the longest GPU kernels.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    csv: Csv = None,
    debug: Debug = False,
) -> None:
    """Time a published transformer with random weights, dense and sparse."""
    with errors(debug):
        from vdit_sparse.app.bench_model import as_data, measure
        from vdit_sparse.app.bench_request import parse_model
        from vdit_sparse.app.bench_tables import model_facts, model_table

        request = parse_model(context.params)
        facts = model_facts(model, request)
        rows = measure(request, complain, lambda row: append(csv, as_data([row]), facts))
        typer.echo(model_table(rows, request, facts))


@bench.command()
def kernels(
    context: typer.Context,
    shape: Annotated[list[str] | None, typer.Option(help="A shape; repeatable; default all.")] = (
        None
    ),
    kernel: Annotated[
        list[str] | None, typer.Option(help="A kernel; repeatable; default all.")
    ] = None,
    pattern: Annotated[
        list[str] | None, typer.Option(help="local, random or ragged; repeatable; default all.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="A method whose masks to take; repeatable; default all; none for none."),
    ] = None,
    density: Annotated[
        list[float] | None, typer.Option(help="Kept share; repeatable; default 0.25 and 0.1.")
    ] = None,
    block: Block = 128,
    device: Device = None,
    dtype: Dtype = None,
    csv: Csv = None,
    png: Annotated[Path | None, typer.Option(help="Write a roofline here.", metavar="FILE")] = None,
    seconds: Seconds = None,
    debug: Debug = False,
) -> None:
    """Time attention kernels at the sizes of published models, after checking each."""
    with errors(debug):
        from vdit_sparse.app.bench_kernels import measure
        from vdit_sparse.app.bench_request import parse_kernels
        from vdit_sparse.app.bench_tables import facts_of, kernel_lines, write_roofline

        request = parse_kernels(context.params)
        facts = facts_of(request.device, request.dtype) | {"block": block}
        typer.echo(", ".join(f"{name} {value}" for name, value in facts.items()))
        rows = []
        for found in measure(request, complain, lambda row: append(csv, [row], facts)):
            typer.echo("\n".join(kernel_lines(found)))
            rows += found
        write_roofline(png, rows, facts["machine"])


def append(path: Path | None, rows: list[dict], facts: dict) -> None:
    """Appends rows, each with the facts of the machine, to a CSV file; a new one gets a header."""
    if path is None or not rows:
        return
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0] | facts))
        if new:
            writer.writeheader()
        writer.writerows(row | facts for row in rows)
