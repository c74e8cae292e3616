"""`vdit-sparse tune`: its options.

Only the standard library and typer are imported here, as in `cli.py`.
"""

from typing import Annotated

import typer

from vdit_sparse.app.common_cli import (
    SEARCH,
    Base,
    Debug,
    Device,
    Dtype,
    Frames,
    Guidance,
    Image,
    Model,
    Offload,
    OutFile,
    OverwriteFile,
    SearchField,
    Size,
    Steps,
    option,
)
from vdit_sparse.app.terminal import bars, errors

TARGET = "Target"


Density = Annotated[
    list[float] | None,
    option(TARGET, "Mean over all self-attention of a run; repeatable, for a file each."),
]
TargetPSNR = Annotated[float | None, option(TARGET, "In dB against dense attention.")]
Speedup = Annotated[float | None, option(TARGET, "Of the denoising, over the best dense.")]
Prompts = Annotated[
    str | None,
    option(SEARCH, "Text file, a prompt a line; the bundled model has some.", metavar="FILE"),
]
Seeds = Annotated[str, option(SEARCH, "Seeds for each prompt: 0,1 or 0-3.", metavar="LIST")]
Effects = Annotated[
    str | None,
    option(SEARCH, "What is disturbed to weigh errors: head, layer or none."),
]
Rounds = Annotated[int, option(SEARCH, "Random changes to the weights that are tried.")]
Batch = Annotated[int | None, option(SEARCH, "Samples at once; 8 of the bundled model, else 1.")]


def tune(
    context: typer.Context,
    out: OutFile,
    density: Density = None,
    target_psnr: TargetPSNR = None,
    speedup: Speedup = None,
    prompts: Prompts = None,
    seeds: Seeds = "0",
    set_: SearchField = None,
    effects: Effects = None,
    rounds: Rounds = 32,
    batch: Batch = None,
    model: Model = None,
    base: Base = None,
    guidance_scale: Guidance = None,
    steps: Steps = None,
    size: Size = None,
    num_frames: Frames = None,
    image: Image = None,
    offload: Offload = "none",
    dtype: Dtype = None,
    device: Device = None,
    overwrite: OverwriteFile = False,
    debug: Debug = False,
) -> None:
    """Find which heads compute how much at which steps, for a density, a PSNR or a speed-up."""
    with errors(debug, "Interrupted; the file is written when the search is finished."):
        from vdit_sparse.app.tune import parse_tune
        from vdit_sparse.app.tune import tune as make

        request = parse_tune(context.params)
        with bars() as progress:
            said = make(request, progress)
        typer.echo("\n".join(said))
