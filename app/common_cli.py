"""Options that several commands share, and the panels they stand in.

Only the standard library and typer are imported here, as in `cli.py`.
"""

from typing import Annotated

import typer

VIDEO, METHOD, SEARCH, MODEL, MACHINE, FILES = (
    "Video",
    "Method",
    "Search",
    "Model",
    "Machine",
    "Files",
)


def option(panel: str, help: str, *names: str, metavar: str | None = None):
    """An option in a panel of `--help`."""
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel)


Negative = Annotated[str | None, option(VIDEO, "What to avoid.")]
Guidance = Annotated[float | None, option(VIDEO, "Weight of the prompt; 1 is no guidance.")]
Steps = Annotated[int | None, option(VIDEO, "Denoising steps.")]
Size = Annotated[str | None, option(VIDEO, "Pixels, such as 256x448.", metavar="HxW")]
Frames = Annotated[int | None, option(VIDEO, "Frames of the video.")]
Image = Annotated[str | None, option(VIDEO, "First frame (image-to-video).", metavar="FILE")]
Seeds = Annotated[str, option(VIDEO, "Seeds for each prompt: 0,1 or 0-3.", metavar="LIST")]
Set = Annotated[
    list[str] | None,
    option(METHOD, "A field of the method; repeatable.", "--set", metavar="FIELD=VALUE"),
]
SearchField = Annotated[
    list[str] | None,
    option(SEARCH, "A field of the search; repeatable.", "--set", metavar="FIELD=VALUE"),
]
Preset = Annotated[str | None, option(METHOD, "Published settings of a method.")]
Model = Annotated[
    str | None,
    option(MODEL, "Hub id, folder or file; default the bundled model.", metavar="ID_OR_PATH"),
]
Base = Annotated[
    str | None,
    option(MODEL, "Where a file's other parts come from.", metavar="ID_OR_PATH"),
]
Lora = Annotated[
    list[str] | None,
    option(MODEL, "LoRA, and its weight if not 1; repeatable.", metavar="ID_OR_PATH[:WEIGHT]"),
]
Offload = Annotated[str, option(MACHINE, "What waits in RAM: none, model, sequential or group.")]
Compile = Annotated[bool, option(MACHINE, "Compile the transformer's blocks.", "--compile")]
Dtype = Annotated[str | None, option(MACHINE, "bf16, fp16 or fp32.")]
Device = Annotated[str | None, option(MACHINE, "cpu, cuda, cuda:1 or mps.")]
Out = Annotated[str, option(FILES, "Folder for the results.", metavar="DIR")]
Overwrite = Annotated[bool, option(FILES, "Replace the results in --out.", "--overwrite")]
OutFile = Annotated[str, option(FILES, "Where to write it.", metavar="FILE.safetensors")]
OverwriteFile = Annotated[bool, option(FILES, "Replace --out.", "--overwrite")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and library warnings.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
