"""Do clips show what their prompts say? Counted by the judge, and checked without it.

    python -m vdit_sparse.eval.adherence --prompts 64 --seeds 4 --out DIR

draws prompts from the bundled model's grammar, always the same ones, generates each from several
seeds, and prints per row the accuracy on these clips, the accuracy of the same measure on renders
that show their captions, and the ratio of the two: the adherence; once for all clips and once each
for those with a static and with a moving camera. The files are written after every batch, so that
a run that is killed leaves what it counted.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vdit_sparse.eval.adherence_checks import CHECKS, check, crosses
from vdit_sparse.eval.adherence_show import Show
from vdit_sparse.eval.denoise import timed_call
from vdit_sparse.eval.judge import Judge, load_judge
from vdit_sparse.kernels.bench import machine
from vdit_sparse.pipelines.load import defaults, load_pipeline
from vdit_sparse.pipelines.mini.training.captions import Spec, sample_spec
from vdit_sparse.pipelines.mini.training.clips import to_bytes
from vdit_sparse.pipelines.mini.training.judge_labels import (
    ROWS,
    Score,
    has_moving_camera,
    labels,
    score,
)
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
GROUPS: dict[str, Callable[[Spec], bool]] = {
    "rows": lambda spec: True,
    "static camera": lambda spec: not has_moving_camera(spec),
    "moving camera": has_moving_camera,
}
"""Key of the result -> the clips that its table is about; the judge's accuracy on renders is that
of the same kind of clips."""

_HELD_OUT = {"rows": "renders", "static camera": "static", "moving camera": "moving"}
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
    found = [check(video, spec) for video, spec in zip(videos, specs, strict=True)]
    return {row: _sum(each[row] for each in found) for row in CHECKS}


def _sum(scores: Iterable[Score]) -> Score:
    return sum(scores, Score())


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


def evaluate(
    pipe, judge: Judge, arguments: argparse.Namespace, keep: Callable[[dict], None], show: Show
) -> dict:
    """Measures the checks on renders, generates and counts; the whole result for a JSON file.

    keep: called with the result so far after each batch; show: gets every clip.
    """
    inputs = _call(pipe, arguments)
    shape = (inputs["height"], inputs["width"], inputs["num_frames"])
    made = renders(arguments.renders, *shape, pipe.device)
    scores = [(spec, check(video, spec)) for video, spec in made]
    known = {group: _on_renders(judge, group, scores) for group in GROUPS}
    facts = {
        "prompts": arguments.prompts,
        "seeds": arguments.seeds,
        "model": arguments.model or "mini",
        "call": inputs,
        "renders": {"judge": judge.held_out.get("clips", 0), "checks": len(scores)},
        **machine(torch.device(pipe.device)),
    }
    totals = {group: dict.fromkeys((*ROWS, *CHECKS), Score()) for group in GROUPS}
    result, clips, specs = {}, 0, draw_specs(arguments.prompts)
    for videos, part in generated(pipe, specs, arguments.seeds, arguments.batch, inputs):
        for video, spec in zip(videos, part, strict=True):
            show.add(video, spec.caption)
            _count(totals, adherence(judge, [video], [spec]), spec)
        clips += len(part)
        tables = {group: compared(totals[group], known[group]) for group in GROUPS}
        result = {**tables, "clips": clips, **facts}
        keep(result)
        report(f"{clips} clips judged")
    return result


def _call(pipe, arguments: argparse.Namespace) -> dict:
    inputs = {name: value for name, value in defaults(pipe).items() if name != "fps"}
    changed = {
        "height": arguments.height,
        "width": arguments.width,
        "num_frames": arguments.frames,
        "num_inference_steps": arguments.steps,
        "guidance_scale": arguments.guidance,
    }
    return inputs | {name: value for name, value in changed.items() if value is not None}


def _on_renders(judge: Judge, group: str, scores: list) -> dict[str, float | None]:
    """Row -> accuracy on renders of the clips of a group: the judge's held-out ones, and for the
    checks the `scores` of renders, each with its spec."""
    found = {row: judge.accuracy(row, _HELD_OUT[group]) for row in ROWS}
    chosen = [each for spec, each in scores if GROUPS[group](spec)]
    if chosen:
        found |= {row: _sum(each[row] for each in chosen).accuracy for row in CHECKS}
    return found


def _count(totals: dict[str, dict[str, Score]], found: dict[str, Score], spec: Spec) -> None:
    for group, belongs in GROUPS.items():
        if belongs(spec):
            for row, each in found.items():
                totals[group][row] += each


def tables(result: Mapping) -> str:
    """All tables of a result as Markdown, each with its title."""
    titles = {group: group for group in GROUPS} | {"rows": "all clips"}
    parts = [f"**{titles[group]}**\n\n{table(result[group])}" for group in GROUPS if result[group]]
    return "\n\n".join(parts)


def write(result: Mapping, folder: Path) -> None:
    """Writes `adherence.json`, a report for the model card, and `adherence.md`, each at once."""
    text = tables(result)
    content = {"markdown": text, **result}
    files = {"adherence.json": json.dumps(content, indent=1), "adherence.md": text}
    for name, text in files.items():
        partial = folder / f"{name}.partial"
        partial.write_text(text + "\n")
        partial.replace(folder / name)


def main(words: list[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else words
    arguments = _parser().parse_args(words)
    judge = load_judge(arguments.judge)
    pipe = load_pipeline(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    command = f"python -m vdit_sparse.eval.adherence {shlex.join(words)}"
    show = Show(arguments.out, arguments.show, defaults(pipe).get("fps", 16))
    with torch.inference_mode():
        result = evaluate(
            pipe,
            judge,
            arguments,
            lambda each: write({**each, "command": command}, arguments.out),
            show,
        )
    report({name: value for name, value in result.items() if name not in GROUPS})
    report("adherence\n" + tables(result))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=4, help="clips of each prompt")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--renders", type=int, default=256, help="clips to try the checks on")
    for name in ("height", "width", "frames", "steps"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--show", type=int, default=0, help="of the first so many clips: a sheet")
    parser.add_argument("--model", help="default: the bundled model")
    parser.add_argument("--judge", type=Path, help="default: the bundled model's")
    return parser


if __name__ == "__main__":
    main()
