"""`vdit-sparse inspect`: its options.

Only the standard library and typer are imported here, as in `cli.py`.
"""

from typing import Annotated

import typer

from vdit_sparse.app.common_cli import (
    FILES,
    METHOD,
    VIDEO,
    Base,
    Debug,
    Device,
    Dtype,
    Frames,
    Guidance,
    Image,
    Lora,
    Model,
    Negative,
    Offload,
    Overwrite,
    Preset,
    Set,
    Size,
    option,
)
from vdit_sparse.app.terminal import bars, errors

LOOK = "What to show"


Layers = Annotated[
    str | None, option(LOOK, "Whose maps: 0,5,9 or 0-3 or all; default three.", metavar="LIST")
]
Heads = Annotated[str | None, option(LOOK, "Whose maps, likewise; default two.", metavar="LIST")]
Steps = Annotated[
    str | None,
    option(LOOK, "Measured steps, likewise; default three of the sparse ones.", metavar="LIST"),
]
Prompt = Annotated[str, option(VIDEO, "What the video shows.")]
Count = Annotated[int | None, option(VIDEO, "Denoising steps of the run.")]
Seed = Annotated[int, option(VIDEO, "Number of the noise.")]
Method = Annotated[str | None, option(METHOD, "A method; default radial.")]
Out = Annotated[str, option(FILES, "Folder for the pictures.", metavar="DIR")]


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
    base: Base = None,
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
