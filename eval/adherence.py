"""Do clips show what their prompts say? Counted by the judge, and checked without it.

    python -m vdit_sparse.eval.adherence --prompts 64 --seeds 4 --out DIR

draws prompts from the bundled model's grammar, always the same ones, generates each from several
seeds, and prints per row the accuracy on these clips, the accuracy of the same measure on renders
that show their captions, and the ratio of the two: the adherence.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vdit_sparse.eval.adherence_checks import CHECKS, check, crosses
from vdit_sparse.eval.denoise import timed_call
from vdit_sparse.eval.judge import Judge, load_judge
from vdit_sparse.kernels.bench import machine
from vdit_sparse.pipelines.load import defaults, load_pipeline
from vdit_sparse.pipelines.mini.training.captions import Spec, sample_spec
from vdit_sparse.pipelines.mini.training.clips import to_bytes
from vdit_sparse.pipelines.mini.training.judge_labels import ROWS, Score, labels, score
from vdit_sparse.pipelines.mini.training.pacing import report
from vdit_sparse.pipelines.mini.training.video import ProceduralVideo

BARS = {
    "place": 0.95,
    "object": 0.85,
    "colour": 0.85,
    "direction": 0.85,
    "count": 0.7,
    "camera": 0.7,
}
"""Row -> the least adherence that is asked of the bundled model."""

TITLES = ("row", "asked", "accuracy", "on renders", "adherence", "bar")
# Millions of seeds that neither training nor its held-out clips use.
_PROMPT_SEED, _RENDER_SEED = 23_000_000, 24_000_000


def adherence(judge: Judge, videos: Sequence[Tensor], specs: Sequence[Spec]) -> dict[str, Score]:
    """Row -> how many of the asked things the videos show; several batches' scores add up.

    The rows of `judge_labels.ROWS` are the judge's, those of `adherence_checks.CHECKS` need none.

    videos: uint8 `[T, 3, H, W]` or float in [0, 1]; specs: what each should show. Raises
    ValueError for lists of different lengths.
    """
    answers = [judge.answers(video) for video in videos]
    found = score(answers, [labels(spec) for spec in specs])
    return found | checked(videos, specs)


def checked(videos: Sequence[Tensor], specs: Sequence[Spec]) -> dict[str, Score]:
    """Row -> score of the checks without a network."""
    totals = dict.fromkeys(CHECKS, Score())
    for video, spec in zip(videos, specs, strict=True):
        for row, found in check(video, spec).items():
            totals[row] += found
    return totals


def draw_specs(count: int) -> list[Spec]:
    """The evaluation's prompts: always the same, whatever was drawn elsewhere."""
    rng = np.random.default_rng(_PROMPT_SEED)
    return [sample_spec(rng) for _ in range(count)]


def renders(count: int, height: int, width: int, frames: int, device) -> Iterator:
    """Uint8 videos `[T, 3, H, W]` and specs of `count` random clips, those that no check applies
    to left out: what the checks find where everything is as the caption says."""
    rng = np.random.default_rng(_RENDER_SEED)
    generator = ProceduralVideo(device, height, width, frames)
    specs = [spec for spec in (sample_spec(rng) for _ in range(count)) if crosses(spec)]
    for start in range(0, len(specs), 8):
        part = specs[start : start + 8]
        for video, spec in zip(to_bytes(generator.render(part)), part, strict=True):
            yield video.transpose(0, 1), spec


def generated(pipe, specs: Sequence[Spec], seeds: int, batch: int, inputs: dict) -> Iterator:
    """Batches of uint8 videos `[B, T, 3, H, W]` on the CPU, and their specs.

    Clip number n of the list (all prompts with their first seed, then the second, ...) starts from
    the noise of seed n. inputs: the other arguments of the pipeline's call.
    """
    every = list(specs) * seeds
    for start in range(0, len(every), batch):
        part = every[start : start + batch]
        prompts = [spec.caption for spec in part]
        numbers = list(range(start, start + len(part)))
        frames, _ = timed_call(pipe, {**inputs, "prompt": prompts, "seed": numbers}, _silent)
        yield frames, part


def compared(found: Mapping[str, Score], on_renders: Mapping[str, float | None]) -> list[dict]:
    """One dict for each row in which anything was asked, with the keys of `TITLES`; `adherence` is
    None where the measure was not made on renders or was never right there."""
    rows = []
    for row, each in found.items():
        if not each.asked:
            continue
        known = on_renders.get(row)
        ratio = each.accuracy / known if known else None
        values = (row, each.asked, each.accuracy, known, ratio, BARS.get(row))
        rows.append(dict(zip(TITLES, values, strict=True)))
    return rows


def table(rows: Sequence[dict]) -> str:
    """The rows of `compared` as Markdown; the bar says whether it is met."""
    lines = [f"| {' | '.join(TITLES)} |", "|" + "---|" * len(TITLES)]
    for row in rows:
        name, asked, *numbers, bar = (row[title] for title in TITLES)
        cells = [name, str(asked), *("" if n is None else f"{n:.3f}" for n in numbers)]
        lines.append(f"| {' | '.join([*cells, _bar(row['adherence'], bar)])} |")
    return "\n".join(lines)


def _bar(ratio: float | None, bar: float | None) -> str:
    if bar is None or ratio is None:
        return "" if bar is None else f"{bar:.2f}"
    return f"{bar:.2f} {'met' if ratio >= bar else 'not met'}"


def _silent(*_: object) -> None:
    """Nobody watches the steps."""


def evaluate(pipe, judge: Judge, arguments: argparse.Namespace) -> dict:
    """Generates, counts, measures the checks on renders; the whole result for a JSON file."""
    inputs = {name: value for name, value in defaults(pipe).items() if name != "fps"}
    changed = {
        "num_frames": arguments.frames,
        "num_inference_steps": arguments.steps,
        "guidance_scale": arguments.guidance,
    }
    inputs |= {name: value for name, value in changed.items() if value is not None}
    totals = dict.fromkeys((*ROWS, *CHECKS), Score())
    specs = draw_specs(arguments.prompts)
    for videos, part in generated(pipe, specs, arguments.seeds, arguments.batch, inputs):
        for row, found in adherence(judge, list(videos), part).items():
            totals[row] += found
        report(f"{totals['place'].asked} clips judged")
    shape = (inputs["height"], inputs["width"], inputs["num_frames"])
    pairs = list(renders(arguments.renders, *shape, pipe.device))
    on_renders = {row: judge.accuracy(row) for row in ROWS}
    if pairs:
        scores = checked(*zip(*pairs, strict=True))
        on_renders |= {row: each.accuracy for row, each in scores.items()}
    return {
        "rows": compared(totals, on_renders),
        "prompts": arguments.prompts,
        "seeds": arguments.seeds,
        "call": inputs,
        "renders": {"judge": judge.held_out.get("clips", 0), "checks": len(pairs)},
        **machine(torch.device(pipe.device)),
    }


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=4, help="clips of each prompt")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--renders", type=int, default=256, help="clips to try the checks on")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--model", help="default: the bundled model")
    parser.add_argument("--judge", type=Path, help="default: the bundled model's")
    arguments = parser.parse_args(words)
    judge = load_judge(arguments.judge)
    pipe = load_pipeline(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        result = evaluate(pipe, judge, arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "adherence.json").write_text(json.dumps(result, indent=1) + "\n")
    text = table(result["rows"])
    (arguments.out / "adherence.md").write_text(text + "\n")
    report({name: value for name, value in result.items() if name != "rows"})
    report("adherence\n" + text)


if __name__ == "__main__":
    main()
