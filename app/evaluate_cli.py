"""`vdit-sparse eval run | report | vbench`: their options.

Only the standard library and typer are imported here, as in `cli.py`.
"""

from typing import Annotated

import typer

from vdit_sparse.app.common_cli import (
    FILES,
    MACHINE,
    MODEL,
    Base,
    Compile,
    Debug,
    Device,
    Dtype,
    Guidance,
    Lora,
    Model,
    Offload,
    Size,
    Steps,
    option,
)
from vdit_sparse.app.terminal import bars, errors

evaluation = typer.Typer(
    no_args_is_help=True, help="Many prompts through several methods, and a report of them."
)

SUITE, METHOD = "Suite", "Methods"


Suite = Annotated[str, option(SUITE, "A bundled suite, or a .toml, .csv, .txt.", metavar="NAME")]
Prompts = Annotated[
    str | None, option(SUITE, "VBench_full_info.json, for suites vbench*.", metavar="FILE")
]
Seeds = Annotated[str, option(SUITE, "Seeds for each prompt: 0-4 or 0,7.", metavar="LIST")]
Methods = Annotated[
    list[str],
    option(METHOD, "dense, METHOD:field=value,... or a preset; repeatable.", "--method"),
]
Metrics = Annotated[str | None, option(METHOD, "Such as psnr,ssim; default all that can run.")]
Negative = Annotated[str | None, option(MODEL, "What to avoid, where a prompt does not say.")]
Frames = Annotated[int | None, option(MODEL, "Frames of each video.")]
Image = Annotated[
    str | None,
    option(MODEL, "First frame, where a prompt has none; or VBench-I2V's DIR.", metavar="FILE"),
]
DenseBackend = Annotated[str | None, option(MACHINE, "Dense attention; default the fastest found.")]
Shard = Annotated[str | None, option(MACHINE, "Part of the samples, 1/8 to 8/8.", metavar="I/N")]
Ray = Annotated[bool, option(MACHINE, "Share the samples out over a Ray cluster.", "--ray")]
RayWorkers = Annotated[int | None, option(MACHINE, "Default one a GPU, or one a node without.")]
Out = Annotated[str, option(FILES, "Folder; what it has is not made again.", metavar="DIR")]
KeepFrames = Annotated[bool, option(FILES, "Keep all frames without loss.", "--keep-frames")]
Folders = Annotated[list[str], typer.Argument(help="Folders of `eval run`.", metavar="DIR...")]
ReportOut = Annotated[
    str | None, option(FILES, "Where it goes; default the first DIR/report.", metavar="DIR")
]
Worst = Annotated[int, option(FILES, "Samples of each method to show as videos.")]
Videos = Annotated[str | None, option(SUITE, "Folder of one method's videos.", metavar="DIR")]
Dimensions = Annotated[
    str | None, option(SUITE, "Such as temporal_flickering,scene; default all that can run.")
]
Python = Annotated[str | None, option(MACHINE, "Python of VBench's environment.", metavar="FILE")]
VBenchOut = Annotated[
    str | None, option(FILES, "For vbench.json; default beside the videos.", metavar="DIR")
]
Setup = Annotated[
    str | None, option(MACHINE, "Make VBench's environment there, and end.", metavar="DIR")
]


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
    base: Base = None,
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
