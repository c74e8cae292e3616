"""Trains the bundled model: stages on one command line, joined by the word `then`.

    python -m vdit_sparse.pipelines.mini.training.train autoencoder --seconds 230 then evaluate

One process runs all stages, because loading the libraries takes seconds of a rented machine.
README.md beside this file has the whole recipe.
"""

import argparse
import shlex
import sys
import time
from dataclasses import asdict, fields
from itertools import groupby
from pathlib import Path

import torch
import torch._dynamo
from diffusers import WanPipeline

from vdit_sparse.pipelines.few_step import load_few_step
from vdit_sparse.pipelines.mini.training.autoencoder import (
    AutoencoderSettings,
    evaluate_autoencoder,
    train_autoencoder,
)
from vdit_sparse.pipelines.mini.training.checkpoints import (
    TOKENIZER,
    Checkpoints,
    adopt,
    assemble,
    export,
    load_autoencoder,
)
from vdit_sparse.pipelines.mini.training.clips import ClipShape
from vdit_sparse.pipelines.mini.training.denoiser import DenoiserSettings, train_denoiser
from vdit_sparse.pipelines.mini.training.distill import (
    DistillSettings,
    export_student,
    train_student,
)
from vdit_sparse.pipelines.mini.training.judge import JUDGES
from vdit_sparse.pipelines.mini.training.judge_training import JudgeSettings, train_judge
from vdit_sparse.pipelines.mini.training.models import SIZES
from vdit_sparse.pipelines.mini.training.pacing import report, stopped_by_signal, stopping
from vdit_sparse.pipelines.mini.training.phrases import PhrasesSettings, train_phrases
from vdit_sparse.pipelines.mini.training.reports import write_report
from vdit_sparse.pipelines.mini.training.sample import (
    PROMPTS,
    Sampling,
    clip_seconds,
    load,
    sample_sheet,
    seconds_table,
)
from vdit_sparse.pipelines.mini.training.structure import measure
from vdit_sparse.pipelines.mini.training.structure_tables import (
    every_head,
    folded,
    numbers,
    summary,
)
from vdit_sparse.pipelines.mini.training.tokenizer import train_tokenizer

JOINT = "then"
PROGRAM = "vdit_sparse.pipelines.mini.training.train"
# All stages of one command line share dynamo's count of graphs per function; its limit of 8 is low.
COMPILED_SHAPES = 64
# What still runs after SIGTERM: it turns what was saved into weights to use.
QUICK = ("export",)
GENERATING = ("sample", "structure", "time")
STRUCTURE_PROMPTS = (PROMPTS[2], PROMPTS[5])


def main(arguments: list[str] | None = None) -> None:
    """Runs the stages of a command line, one after the other."""
    words = sys.argv[1:] if arguments is None else arguments
    groups = groupby(words, key=lambda word: word == JOINT)
    stages = [build_parser().parse_args(list(part)) for joint, part in groups if not joint]
    if not stages:
        build_parser().parse_args([])
    with (
        stopped_by_signal(),
        torch._dynamo.config.patch(recompile_limit=COMPILED_SHAPES),
        torch.backends.cudnn.flags(enabled=True, benchmark=True),
    ):
        for options in stages:
            options.command = f"python -m {PROGRAM} {shlex.join(words)}"
            if stopping() and options.stage not in QUICK:
                report(f"stage {options.stage} left out: told to stop")
            else:
                _run(options)


def _run(options: argparse.Namespace) -> None:
    start = time.perf_counter()
    torch.manual_seed(options.seed)
    report(f"stage {options.stage}: {vars(options)}")
    RUNNERS[options.stage](options)
    if torch.cuda.is_available():
        report(f"GPU memory peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
        torch.cuda.empty_cache()
    report(f"stage {options.stage} took {time.perf_counter() - start:.1f} s")


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of one stage."""
    parser = argparse.ArgumentParser(prog="train", description=__doc__.splitlines()[0])
    stages = parser.add_subparsers(dest="stage", required=True)
    for name in RUNNERS:
        stage = stages.add_parser(name)
        stage.add_argument("--folder", type=Path, default=Path("checkpoints"))
        stage.add_argument("--tokenizer", type=Path, default=TOKENIZER)
        stage.add_argument("--sizes", choices=sorted(SIZES), default="released")
        stage.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        stage.add_argument("--seed", type=int, default=0)
        if name in ("evaluate", *TRAINERS, *GENERATING):
            for side, default in (("height", 256), ("width", 448), ("frames", 25)):
                stage.add_argument(f"--{side}", type=int, default=default)
        if name in GENERATING:
            stage.add_argument("--steps", type=int, default=16)
            stage.add_argument("--guidance", type=float, default=4.0)
        if name in ("evaluate", *GENERATING):
            stage.add_argument("--output", type=Path, help="default: beside the checkpoints")
        if name == "evaluate":
            stage.add_argument("--clips", type=int, default=64)
        if name == "tokenizer":
            stage.add_argument("--captions", type=int, default=20_000)
        if name in ("export", "distill", "adopt", *GENERATING):
            stage.add_argument("--pipeline", type=Path, help="default: FOLDER/mini")
        if name == "export":
            stage.add_argument("--max-shard", default="14MB")
        if name in ("sample", "time"):
            stage.add_argument("--few-step", action="store_true", help="by stage distill's LoRA")
        if name == "time":
            stage.add_argument("--repeats", type=int, default=3)
        if name == "judge":
            _add_judge(stage)
        if name in SETTINGS:
            stage.add_argument("--resume", action="store_true")
            _add_settings(stage, SETTINGS[name])
    return parser


def _add_judge(stage: argparse.ArgumentParser) -> None:
    for side, default in (("height", 128), ("width", 224), ("frames", 25)):
        stage.add_argument(f"--{side}", type=int, default=default)
    stage.add_argument("--output", type=Path, help="default: FOLDER/judge")
    _add_settings(stage, JudgeSettings)


def _add_settings(stage: argparse.ArgumentParser, settings: type) -> None:
    for item in fields(settings):
        action = argparse.BooleanOptionalAction if item.type is bool else "store"
        kind = {} if item.type is bool else {"type": item.type}
        flag = "--" + item.name.replace("_", "-")
        stage.add_argument(flag, action=action, default=item.default, **kind)


def _settings(options: argparse.Namespace, settings: type):
    return settings(**{item.name: getattr(options, item.name) for item in fields(settings)})


def _shape(options: argparse.Namespace) -> ClipShape:
    return ClipShape(options.height, options.width, options.frames, options.device)


def _checkpoints(options: argparse.Namespace) -> Checkpoints:
    return Checkpoints(options.folder, options.tokenizer)


def _pipeline_folder(options: argparse.Namespace) -> Path:
    return options.pipeline or _checkpoints(options).pipeline


def _run_tokenizer(options: argparse.Namespace) -> None:
    train_tokenizer(options.tokenizer, options.captions, SIZES[options.sizes].vocabulary)


def _run_training(options: argparse.Namespace) -> None:
    train = TRAINERS[options.stage]
    settings = _settings(options, SETTINGS[options.stage])
    sizes = SIZES[options.sizes]
    train(_shape(options), sizes, settings, _checkpoints(options), options.resume)


def _run_evaluate(options: argparse.Namespace) -> None:
    vae = load_autoencoder(_checkpoints(options), SIZES[options.sizes])
    found = evaluate_autoencoder(vae, _shape(options), options.clips)
    markdown = "{psnr:.2f} dB on {clips} held-out clips of {frames} frames at {height}x{width}, "
    markdown += "worst frame index {psnr_worst_index:.2f} dB"
    path = options.output or options.folder / "autoencoder.json"
    write_report(path, markdown.format(**found), found, options.device, options.command)
    report(found)


def _run_export(options: argparse.Namespace) -> None:
    pipeline = assemble(_checkpoints(options), SIZES[options.sizes])
    export(pipeline, _pipeline_folder(options), options.max_shard)


def _run_adopt(options: argparse.Namespace) -> None:
    adopt(_pipeline_folder(options), _checkpoints(options))


def _run_distill(options: argparse.Namespace) -> None:
    _run_training(options)
    export_student(_checkpoints(options), _pipeline_folder(options))


def _run_sample(options: argparse.Namespace) -> None:
    pipeline, sampling = _few_step(options)
    path = options.output or options.folder / f"samples_{options.height}x{options.width}.png"
    sample_sheet(pipeline, _shape(options), sampling, path)


def _run_time(options: argparse.Namespace) -> None:
    pipeline, sampling = _few_step(options)
    found = clip_seconds(pipeline, _shape(options), sampling, options.repeats)
    content = {"seconds": found, "call": {**asdict(_shape(options)), **asdict(sampling)}}
    path = options.output or options.folder / "time.json"
    markdown = seconds_table(found, _shape(options), sampling, pipeline.dtype)
    write_report(path, markdown, content, options.device, options.command)
    report(markdown)


def _few_step(options: argparse.Namespace) -> tuple[WanPipeline, Sampling]:
    """The exported pipeline and its sampling, with the few-step LoRA if that is wanted."""
    pipeline = load(_pipeline_folder(options), options.device)
    sampling = Sampling(options.steps, options.guidance, options.seed)
    if options.few_step:
        own = load_few_step(pipeline, _pipeline_folder(options))
        sampling = Sampling(own["num_inference_steps"], own["guidance_scale"], options.seed)
    return pipeline, sampling


def _run_judge(options: argparse.Namespace) -> None:
    train_judge(
        _shape(options),
        SIZES[options.sizes],
        JUDGES[options.sizes],
        _settings(options, JudgeSettings),
        _checkpoints(options),
        options.output or options.folder / "judge",
    )


def _run_structure(options: argparse.Namespace) -> None:
    pipeline = load(_pipeline_folder(options), options.device)
    sampling = Sampling(options.steps, options.guidance, options.seed)
    shape = _shape(options)
    found = measure(pipeline, STRUCTURE_PROMPTS, shape, sampling)
    content = {
        "numbers": numbers(found),
        "prompts": STRUCTURE_PROMPTS,
        "call": {**asdict(shape), **asdict(sampling)},
    }
    markdown = f"{summary(found)}\n\n{folded('Every head', every_head(found))}"
    path = options.output or options.folder / f"structure-{shape.frames}-frames.json"
    write_report(path, markdown, content, options.device, options.command)
    report("attention structure\n" + summary(found))


RUNNERS = {
    "tokenizer": _run_tokenizer,
    "autoencoder": _run_training,
    "evaluate": _run_evaluate,
    "denoiser": _run_training,
    "phrases": _run_training,
    "export": _run_export,
    "sample": _run_sample,
    "structure": _run_structure,
    "time": _run_time,
    "distill": _run_distill,
    "judge": _run_judge,
    "adopt": _run_adopt,
}
SETTINGS = {
    "autoencoder": AutoencoderSettings,
    "denoiser": DenoiserSettings,
    "phrases": PhrasesSettings,
    "distill": DistillSettings,
}
TRAINERS = {
    "autoencoder": train_autoencoder,
    "denoiser": train_denoiser,
    "phrases": train_phrases,
    "distill": train_student,
}


if __name__ == "__main__":
    main()
