"""`vdit-sparse inspect`: its options.

Only the standard library and typer are imported here, as in `cli.py`.
"""

from typing import Annotated

import typer

from vdit_sparse.app.terminal import bars, errors

LOOK, VIDEO, METHOD, MODEL, MACHINE, FILES = (
    "What to show",
    "Video",
    "Method",
    "Model",
    "Machine",
    "Files",
)


def _option(panel: str, help: str, *names: str, metavar: str | None = None):
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel)


Layers = Annotated[
    str | None, _option(LOOK, "Whose maps: 0,5,9 or 0-3 or all; default three.", metavar="LIST")
]
Heads = Annotated[str | None, _option(LOOK, "Whose maps, likewise; default two.", metavar="LIST")]
Steps = Annotated[
    str | None,
    _option(LOOK, "Measured steps, likewise; default three of the sparse ones.", metavar="LIST"),
]
Prompt = Annotated[str, _option(VIDEO, "What the video shows.")]
Negative = Annotated[str | None, _option(VIDEO, "What to avoid.")]
Guidance = Annotated[float | None, _option(VIDEO, "Weight of the prompt; 1 is no guidance.")]
Count = Annotated[int | None, _option(VIDEO, "Denoising steps of the run.")]
Seed = Annotated[int, _option(VIDEO, "Number of the noise.")]
Size = Annotated[str | None, _option(VIDEO, "Pixels, such as 256x448.", metavar="HxW")]
Frames = Annotated[int | None, _option(VIDEO, "Frames of the video.")]
Image = Annotated[str | None, _option(VIDEO, "First frame (image-to-video).", metavar="FILE")]
Method = Annotated[str | None, _option(METHOD, "A method; default radial.")]
Set = Annotated[
    list[str] | None,
    _option(METHOD, "A field of the method; repeatable.", "--set", metavar="FIELD=VALUE"),
]
Preset = Annotated[str | None, _option(METHOD, "Published settings of a method.")]
Model = Annotated[
    str | None,
    _option(MODEL, "Hub id or folder; default the bundled model.", metavar="ID_OR_PATH"),
]
Lora = Annotated[
    list[str] | None,
    _option(MODEL, "LoRA, and its weight if not 1; repeatable.", metavar="ID_OR_PATH[:WEIGHT]"),
]
Offload = Annotated[str, _option(MACHINE, "What waits in RAM: none, model, sequential or group.")]
Dtype = Annotated[str | None, _option(MACHINE, "bf16, fp16 or fp32.")]
Device = Annotated[str | None, _option(MACHINE, "cpu, cuda, cuda:1 or mps.")]
Out = Annotated[str, _option(FILES, "Folder for the pictures.", metavar="DIR")]
Overwrite = Annotated[bool, _option(FILES, "Replace the results in --out.", "--overwrite")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and library warnings.")]


def inspect(
    context: typer.Context,
    prompt: Prompt,
    out: Out,
    method: Method = None,
    set_: Set = None,
    preset: Preset = None,
    layers: Layers = None,
    heads: Heads = None,
    steps: Steps = None,
    model: Model = None,
    lora: Lora = None,
    negative_prompt: Negative = None,
    guidance_scale: Guidance = None,
    num_inference_steps: Count = None,
    seed: Seed = 0,
    size: Size = None,
    num_frames: Frames = None,
    image: Image = None,
    offload: Offload = "none",
    dtype: Dtype = None,
    device: Device = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Show which blocks a method visits, the exact mass beside them, and what it misses."""
    with errors(debug, "Interrupted; nothing was written."):
        from vdit_sparse.app.inspect import inspect as make
        from vdit_sparse.app.inspect import parse_inspection

        request = parse_inspection(context.params)
        with bars() as progress:
            lines = make(request, progress)
        typer.echo("\n".join(lines))
