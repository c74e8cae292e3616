"""`vdit-sparse eval run | report | vbench`: their options.

Only the standard library and typer are imported here, as in `cli.py`.
"""

from typing import Annotated

import typer

from vdit_sparse.app.terminal import bars, errors

evaluation = typer.Typer(
    no_args_is_help=True, help="Many prompts through several methods, and a report of them."
)

SUITE, METHOD, MODEL, MACHINE, FILES = "Suite", "Methods", "Model", "Machine", "Files"


def _option(panel: str, help: str, *names: str, metavar: str | None = None):
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel)


Suite = Annotated[str, _option(SUITE, "A bundled suite, or a .toml, .csv, .txt.", metavar="NAME")]
Prompts = Annotated[
    str | None, _option(SUITE, "VBench_full_info.json, for suites vbench*.", metavar="FILE")
]
Seeds = Annotated[str, _option(SUITE, "Seeds for each prompt: 0-4 or 0,7.", metavar="LIST")]
Methods = Annotated[
    list[str],
    _option(METHOD, "dense, METHOD:field=value,... or a preset; repeatable.", "--method"),
]
Metrics = Annotated[str | None, _option(METHOD, "Such as psnr,ssim; default all that can run.")]
Model = Annotated[
    str | None,
    _option(MODEL, "Hub id or folder; default the bundled model.", metavar="ID_OR_PATH"),
]
Lora = Annotated[
    list[str] | None,
    _option(MODEL, "LoRA, and its weight if not 1; repeatable.", metavar="ID_OR_PATH[:WEIGHT]"),
]
Negative = Annotated[str | None, _option(MODEL, "What to avoid, where a prompt does not say.")]
Guidance = Annotated[float | None, _option(MODEL, "Weight of the prompt; 1 is no guidance.")]
Steps = Annotated[int | None, _option(MODEL, "Denoising steps.")]
Size = Annotated[str | None, _option(MODEL, "Pixels, such as 256x448.", metavar="HxW")]
Frames = Annotated[int | None, _option(MODEL, "Frames of each video.")]
Image = Annotated[
    str | None,
    _option(MODEL, "First frame, where a prompt has none; or VBench-I2V's DIR.", metavar="FILE"),
]
Offload = Annotated[str, _option(MACHINE, "What waits in RAM: none, model, sequential or group.")]
Compile = Annotated[bool, _option(MACHINE, "Compile the transformer's blocks.", "--compile")]
Dtype = Annotated[str | None, _option(MACHINE, "bf16, fp16 or fp32.")]
Device = Annotated[str | None, _option(MACHINE, "cpu, cuda, cuda:1 or mps.")]
DenseBackend = Annotated[
    str | None, _option(MACHINE, "Dense attention; default the fastest found.")
]
Shard = Annotated[str | None, _option(MACHINE, "Part of the samples, 1/8 to 8/8.", metavar="I/N")]
Ray = Annotated[bool, _option(MACHINE, "Share the samples out over a Ray cluster.", "--ray")]
RayWorkers = Annotated[int | None, _option(MACHINE, "Default one a GPU, or one a node without.")]
Out = Annotated[str, _option(FILES, "Folder; what it has is not made again.", metavar="DIR")]
KeepFrames = Annotated[bool, _option(FILES, "Keep all frames without loss.", "--keep-frames")]
Folders = Annotated[list[str], typer.Argument(help="Folders of `eval run`.", metavar="DIR...")]
ReportOut = Annotated[
    str | None, _option(FILES, "Where it goes; default the first DIR/report.", metavar="DIR")
]
Worst = Annotated[int, _option(FILES, "Samples of each method to show as videos.")]
Videos = Annotated[str | None, _option(SUITE, "Folder of one method's videos.", metavar="DIR")]
Dimensions = Annotated[
    str | None, _option(SUITE, "Such as temporal_flickering,scene; default all that can run.")
]
Python = Annotated[str | None, _option(MACHINE, "Python of VBench's environment.", metavar="FILE")]
VBenchOut = Annotated[
    str | None, _option(FILES, "For vbench.json; default beside the videos.", metavar="DIR")
]
Setup = Annotated[
    str | None, _option(MACHINE, "Make VBench's environment there, and end.", metavar="DIR")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and library warnings.")]


@evaluation.command()
def run(
    context: typer.Context,
    suite: Suite,
    method: Methods,
    out: Out,
    prompts: Prompts = None,
    seeds: Seeds = "0",
    metrics: Metrics = None,
    model: Model = None,
    lora: Lora = None,
    negative_prompt: Negative = None,
    guidance_scale: Guidance = None,
    steps: Steps = None,
    size: Size = None,
    num_frames: Frames = None,
    image: Image = None,
    offload: Offload = "none",
    compile: Compile = False,
    dtype: Dtype = None,
    device: Device = None,
    dense_backend: DenseBackend = None,
    shard: Shard = None,
    ray: Ray = False,
    ray_workers: RayWorkers = None,
    keep_frames: KeepFrames = False,
    debug: Debug = False,
) -> None:
    """Run a suite of prompts through methods, measure each sample, go on where it was stopped."""
    said = "Interrupted; finished samples are kept, and the same command goes on with the rest."
    with errors(debug, said):
        from vdit_sparse.app.evaluate import evaluate
        from vdit_sparse.app.evaluate_request import parse_evaluation

        words = {**context.params, "torchrun": context.obj["torchrun"], "command": None}
        request = parse_evaluation(words)
        with bars() as progress:
            lines = evaluate(request, progress)
        typer.echo("\n".join(lines))


@evaluation.command()
def report(
    folders: Folders,
    out: ReportOut = None,
    worst: Worst = 2,
    debug: Debug = False,
) -> None:
    """Tables, plots and the worst samples of finished evaluations: Markdown, CSV and HTML."""
    with errors(debug):
        from vdit_sparse.app.evaluate_report import write_report

        typer.echo("\n".join(write_report(folders, out, worst)))


@evaluation.command()
def vbench(
    context: typer.Context,
    videos: Videos = None,
    prompts: Prompts = None,
    dimensions: Dimensions = None,
    python: Python = None,
    out: VBenchOut = None,
    device: Device = None,
    setup: Setup = None,
    debug: Debug = False,
) -> None:
    """Score a method's videos by VBench; all but temporal flickering in its own environment."""
    said = "Interrupted; finished dimensions are in vbench.json."
    with errors(debug, said):
        from pathlib import Path

        from vdit_sparse.app.evaluate_vbench import evaluate_vbench, parse_vbench, set_up

        if setup is not None:
            typer.echo("\n".join(set_up(Path(setup))))
            return
        run = parse_vbench(context.params)
        with bars() as progress:
            lines = evaluate_vbench(run, progress)
        typer.echo("\n".join(lines))
