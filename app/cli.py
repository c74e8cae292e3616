"""The command line: `vdit-sparse generate | estimate | calibrate | eval | demo | bench | ...`.

Only the standard library, typer and rich are imported here, so that `--help` answers at once.
"""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer.core import TyperGroup

from vdit_sparse.app.bench import bench
from vdit_sparse.app.common_cli import (
    FILES,
    MACHINE,
    METHOD,
    MODEL,
    VIDEO,
    Base,
    Compile,
    Debug,
    Device,
    Dtype,
    Frames,
    Guidance,
    Image,
    Json,
    Lora,
    Model,
    Negative,
    Offload,
    Out,
    OutFile,
    Overwrite,
    OverwriteFile,
    Preset,
    SearchField,
    Seeds,
    Set,
    Size,
    Steps,
    option,
)
from vdit_sparse.app.estimate_cli import estimate, models
from vdit_sparse.app.evaluate_cli import evaluation
from vdit_sparse.app.generate_cli import generate_and_show
from vdit_sparse.app.inspect_cli import inspect
from vdit_sparse.app.terminal import INTERRUPTED, OK, bars, complain, errors, print_json
from vdit_sparse.app.tune_cli import tune

# Their loading bars, download bars and advice; ours say what is going on.
QUIET = {
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
}
# What torchrun tells each of its processes.
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


class OneLineErrors(TyperGroup):
    """A command group whose usage errors are one line on stderr and exit code 2."""

    def main(self, args=None, prog_name=None, **options):
        words = list(sys.argv[1:] if args is None else args)
        torchrun = {name: os.environ[name] for name in TORCHRUN if name in os.environ}
        shared = {"words": words, "torchrun": torchrun}
        options = {**options, "standalone_mode": False, "obj": shared}
        try:
            code = super().main(args=words, prog_name=prog_name or "vdit-sparse", **options)
        except typer.Abort:
            code = INTERRUPTED
        except Exception as error:
            # typer keeps the base class of its usage errors to itself.
            if not hasattr(error, "format_message"):
                raise
            if error.format_message():
                complain(f"{error.format_message().rstrip('.')}. See `vdit-sparse --help`.")
            code = error.exit_code
        sys.exit(code or OK)


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Sparse attention for diffusers' video and image transformers, and what it costs.",
)
app.add_typer(bench, name="bench")
app.add_typer(evaluation, name="eval")


Prompt = Annotated[str, option(VIDEO, "What the video shows.")]
Seed = Annotated[int, option(VIDEO, "Number of the noise, which is the same in all runs.")]
Method = Annotated[str | None, option(METHOD, "A method, or dense; default radial.")]
Calibration = Annotated[
    str | None, option(METHOD, "What calibrate or tune wrote, and its method.", metavar="FILE")
]
Compare = Annotated[
    list[str] | None,
    option(
        METHOD,
        "Also run dense, METHOD:field=value,... or a preset; repeatable.",
        metavar="dense|METHOD",
    ),
]
DenseBackend = Annotated[
    str | None,
    option(MACHINE, "native, _native_cudnn, flash, _flash_3, xformers or sage."),
]
Parallel = Annotated[str, option(MACHINE, "Under torchrun: share tokens, guidance or both.")]
Check = Annotated[
    str,
    option(
        METHOD,
        "What to do where a layer's first sparse call is far from exact attention: warn, strict "
        "(stop) or off (do not look).",
        metavar="warn|strict|off",
    ),
]
Calibrated = Annotated[str, option(METHOD, "paro or sparse-vdit.", "--method")]
Prompts = Annotated[str, option(VIDEO, "Text file, a prompt a line.", metavar="FILE")]


@app.command()
def generate(
    context: typer.Context,
    prompt: Prompt,
    out: Out,
    method: Method = None,
    set_: Set = None,
    calibration: Calibration = None,
    preset: Preset = None,
    compare: Compare = None,
    check: Check = "warn",
    model: Model = None,
    base: Base = None,
    lora: Lora = None,
    negative_prompt: Negative = None,
    guidance_scale: Guidance = None,
    steps: Steps = None,
    seed: Seed = 0,
    size: Size = None,
    num_frames: Frames = None,
    image: Image = None,
    offload: Offload = "none",
    compile: Compile = False,
    dtype: Dtype = None,
    device: Device = None,
    dense_backend: DenseBackend = None,
    parallel: Parallel = "tokens",
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Make a video through sparse attention, and compare it with dense attention."""
    interrupted = "Interrupted; finished runs and their report are in the output folder."
    with errors(debug, interrupted):
        command = shlex.join(["vdit-sparse", *context.obj["words"]])
        generate_and_show({**context.params, "command": command})


@app.command()
def calibrate(
    context: typer.Context,
    method: Calibrated,
    prompts: Prompts,
    out: OutFile,
    set_: SearchField = None,
    seeds: Seeds = "0",
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
    """Search what a calibrated method needs for one model and size, on prompts of yours."""
    with errors(debug, "Interrupted; the file is written when the last prompt is finished."):
        from vdit_sparse.app.calibrate import calibrate as make
        from vdit_sparse.app.calibrate import parse_calibration

        request = parse_calibration(context.params)
        with bars() as progress:
            said = make(request, progress)
        typer.echo("\n".join(said))


app.command()(tune)


@app.command()
def demo(
    context: typer.Context,
    host: Annotated[
        str, option(MACHINE, "Address to listen on; 0.0.0.0 lets others in.")
    ] = "127.0.0.1",
    port: Annotated[int, option(MACHINE, "Port to listen on.")] = 7860,
    auth: Annotated[
        str | None,
        option(MACHINE, "Ask for this; @FILE reads it.", metavar="USER:PASSWORD"),
    ] = None,
    model: Annotated[
        list[str] | None,
        option(MODEL, "Offer this beside the bundled one; repeatable.", metavar="ID_OR_PATH"),
    ] = None,
    models: Annotated[
        Path | None, option(MODEL, "Offer every model below this folder.", metavar="DIR")
    ] = None,
    device: Device = None,
    state: Annotated[Path, option(FILES, "Folder for the users' runs.", metavar="DIR")] = Path(
        "outputs/studio"
    ),
    max_pixels: Annotated[int | None, option(MACHINE, "Most pixels of a frame.")] = None,
    max_frames: Annotated[int | None, option(MACHINE, "Most frames of a video.")] = None,
    max_steps: Annotated[int | None, option(MACHINE, "Most denoising steps.")] = None,
    max_waiting: Annotated[int | None, option(MACHINE, "Most runs in the queue.")] = None,
    debug: Debug = False,
) -> None:
    """Open the studio: make, compare and inspect videos in a browser."""
    with errors(debug):
        from vdit_sparse.app.demo.command import check_gradio, parse_studio

        check_gradio()
        studio = parse_studio(context.params)
        from vdit_sparse.app.demo.server import serve

        typer.echo(f"The studio is at http://{host}:{port} (Ctrl-C ends it).")
        serve(studio, host, port)


app.command()(estimate)
app.command()(models)
app.command()(inspect)


@app.command()
def methods(json: Json = False, debug: Debug = False) -> None:
    """List the methods with their fields, and the presets of each model family."""
    with errors(debug):
        from vdit_sparse.app.catalogue import catalogue, show

        content = catalogue()
        print_json(content) if json else show(content, Console())


@app.command()
def doctor(json: Json = False, debug: Debug = False) -> None:
    """Say what this machine has, and which backends work on it."""
    with errors(debug):
        from vdit_sparse.app.doctor import as_data, examine, show

        checks = examine()
        print_json(as_data(checks)) if json else show(checks, Console())


def main() -> None:
    """The console entry point."""
    if "--debug" not in sys.argv:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
    app()


if __name__ == "__main__":
    main()
