"""`vdit-sparse tune`: its options.

Only the standard library and typer are imported here, as in `cli.py`.
"""

from typing import Annotated

import typer

from vdit_sparse.app.terminal import bars, errors

TARGET, SEARCH, MODEL, MACHINE, FILES = "Target", "Search", "Model", "Machine", "Files"


def _option(panel: str, help: str, *names: str, metavar: str | None = None):
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel)


Density = Annotated[float | None, _option(TARGET, "Mean over all self-attention of a run.")]
TargetPSNR = Annotated[float | None, _option(TARGET, "In dB against dense attention.")]
Speedup = Annotated[float | None, _option(TARGET, "Of the denoising, over the best dense.")]
Prompts = Annotated[
    str | None,
    _option(SEARCH, "Text file, a prompt a line; the bundled model has some.", metavar="FILE"),
]
Seeds = Annotated[str, _option(SEARCH, "Seeds for each prompt: 0,1 or 0-3.", metavar="LIST")]
SearchField = Annotated[
    list[str] | None,
    _option(SEARCH, "A field of the search; repeatable.", "--set", metavar="FIELD=VALUE"),
]
Effects = Annotated[
    str | None,
    _option(SEARCH, "What is disturbed to weigh errors: head, layer or none."),
]
Rounds = Annotated[int, _option(SEARCH, "Random changes to the weights that are tried.")]
Batch = Annotated[int | None, _option(SEARCH, "Samples at once; 8 of the bundled model, else 1.")]
Model = Annotated[
    str | None,
    _option(MODEL, "Hub id or folder; default the bundled model.", metavar="ID_OR_PATH"),
]
Guidance = Annotated[float | None, _option(MODEL, "Weight of the prompt; 1 is no guidance.")]
Steps = Annotated[int | None, _option(MODEL, "Denoising steps.")]
Size = Annotated[str | None, _option(MODEL, "Pixels, such as 256x448.", metavar="HxW")]
Frames = Annotated[int | None, _option(MODEL, "Frames of the video.")]
Image = Annotated[str | None, _option(MODEL, "First frame (image-to-video).", metavar="FILE")]
Offload = Annotated[str, _option(MACHINE, "What waits in RAM: none, model, sequential or group.")]
Dtype = Annotated[str | None, _option(MACHINE, "bf16, fp16 or fp32.")]
Device = Annotated[str | None, _option(MACHINE, "cpu, cuda, cuda:1 or mps.")]
OutFile = Annotated[str, _option(FILES, "Where to write it.", metavar="FILE.safetensors")]
OverwriteFile = Annotated[bool, _option(FILES, "Replace --out.", "--overwrite")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and library warnings.")]


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
