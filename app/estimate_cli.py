"""`vdit-sparse estimate` and `models`: their options.

Only the standard library, typer and rich are imported here, as in `cli.py`.
"""

from typing import Annotated

import typer
from rich.console import Console

from vdit_sparse.app.common_cli import (
    Debug,
    Json,
    Set,
)
from vdit_sparse.app.terminal import errors, print_json

Density = Annotated[
    float | None, typer.Option(help="Of a sparse call, where the method's fields allow to say it.")
]


def estimate(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(
            help="A name from `models`, a hub id or folder; default the bundled model.",
            metavar="NAME|ID|PATH",
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Pixels; default the model's.", metavar="HxW")
    ] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames; default the model's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; default the model's.")] = None,
    method: Annotated[str | None, typer.Option(help="A method, or dense; default radial.")] = None,
    set_: Set = None,
    preset: Annotated[str | None, typer.Option(help="Published settings of a method.")] = None,
    density: Density = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32, of the weights.")] = "bf16",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a video costs, without loading weights: tokens, density, memory, Amdahl's bound."""
    with errors(debug):
        from vdit_sparse.app.estimate import as_data, show
        from vdit_sparse.app.estimate import estimate as make

        found = make(context.params)
        print_json(as_data(found)) if json else show(found, Console())


def models(json: Json = False, debug: Debug = False) -> None:
    """List the model families and their published checkpoints."""
    with errors(debug):
        from vdit_sparse.app.models import as_data, show

        print_json(as_data()) if json else show(Console())
