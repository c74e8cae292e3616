"""Writes docs/compatibility.md: python -m tests.pipelines.stack_table"""

from pathlib import Path

from tests.pipelines.stack_features import FEATURES
from tests.pipelines.stack_outcomes import ROWS, WORKS, outcome_of

FILE = Path(__file__).parents[2] / "docs" / "compatibility.md"
MARKS = {
    "works": "yes",
    "no effect": "no effect",
    "apply again": "yes",
    "first": "first",
    "absent": "–",
    "stock fails": "stock fails",
}
# Columns that are no feature of diffusers, and their tests.
ELSEWHERE = {
    "4 and 8 steps": "tests.pipelines.test_stack::test_few_steps_without_guidance_have_dense_ends"
}
GROUPS = {
    "Compilation, offload, weights": (
        "compile",
        "model",
        "group-leaf",
        "group-block",
        "sequential",
        "casting",
        "int8",
        "fp8",
    ),
    "Adapters, projections, backends, few steps": ("lora", "fuse", "backend", "4 and 8 steps"),
    "Caches and guiders": (
        "first-block",
        "pyramid",
        "magnitude",
        "taylor",
        "cache-dit",
        "layer-skip",
        "score-skip",
    ),
}
HEAD = """\
# What stacks with what

Written by `python -m tests.pipelines.stack_table`; do not edit. Every cell is one test on a tiny
random model of the family (`tests/pipelines/test_stack.py`, `test_cell[FEATURE-MODEL]`): stock
diffusers with the feature equals a dense method with it (bit for bit; projections to 1e-5, compiled
blocks to 1e-4), a sparse method makes as many attention calls, the feature may come before or after
the method, and `remove` leaves the feature on its own. {run}

- **yes**: works, in both orders.
- **first**: works if the feature comes before the method; the other order raises and says so.
- **no effect**: does nothing in stock diffusers either; ours runs as without it.
- **–**: diffusers does not offer it for the family; it raises.
- **stock fails**: diffusers offers it, and raises without us too.

Numbers are the reasons below each table.
"""
RUN = """Every cell passed
as a test on 22 November 2026 on a CPU (torch 2.13, diffusers 0.42.1, accelerate 1.15, peft 0.21.2;
those of torchao and cache-dit with the versions below), none on a GPU."""
NOTES = """\
## Notes

- **Compilation**: `compile_repeated_blocks(fullgraph=True)` where diffusers names the repeated
  blocks, else every block by itself; `aot_eager` on the CPU. A method, the step and the layer are
  no part of the graph: replacing a method compiles nothing anew; the two experts of
  Wan 2.2 have a graph each. Compile the blocks, not the whole
  transformer, whose hook would break the graph.
- **Offload**: model offload is diffusers' own call with the CPU as the device. Sequential offload
  is accelerate's on the transformer, with its weights on `meta` in between. Group offload keeps
  them on disk in between.
- **LoRA** where diffusers' transformer loads none: `peft.inject_adapter_in_model` puts one in, on
  a method or without.
- **fuse_qkv_projections**: our processors call `to_q`, `to_k`, `to_v`, which diffusers keeps, and
  do not use the fused weights; stock attention has them again after `remove`.
- **TaylorSeer** needs `cache_identifiers` that name the layers: diffusers' own patterns match none
  of Wan's or CogVideoX's, and without a match it caches nothing, silently.
- **cache-dit** before the method. After it, what does not raise works, but `remove` takes the cache
  off too, and `cache_dit.disable_cache` fails on our hook: remove the method first.
- **Guiders**: the columns are the hooks that skip-layer and perturbed-attention guidance set. Most
  stock processors are not registered with diffusers, which then refuses to skip their scores; ours
  are. In the tests the stock ones are registered too. Whole runs with a guider are tested on
  HunyuanVideo 1.5 and on Wan as a modular pipeline, which `apply` takes as well: every branch has a
  state of its own, also where a guider leaves branches out of some steps
  (`tests/pipelines/test_guiders.py`).
- **4 and 8 steps** at guidance 1: `dense_steps=1, last_dense_steps=1` is dense in the first and the
  last step, sparse in between. So are the presets called few-steps, of Wan 2.1 and of the families
  with a checkpoint for few steps: FLUX.1, FLUX.2 and Z-Image.
- A cache that skips a step's attention skips it for a dense and for a sparse method alike; a plan
  that is refreshed every few calls counts steps, and not calls.
- torchao {torchao}, cache-dit {cache_dit}: tested where installed.
"""
VERSIONS = {"torchao": "0.18.0", "cache_dit": "1.5.3"}


def page() -> str:
    parts = [HEAD.format(run=RUN)]
    parts += [_table(title, columns) for title, columns in GROUPS.items()]
    return "\n".join([*parts, NOTES.format(**VERSIONS)])


def _table(title: str, columns: tuple[str, ...]) -> str:
    reasons: dict[str, int] = {}
    heads = [FEATURES[name].title if name in FEATURES else name for name in columns]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---|' * len(columns)}"]
    for entry, family in ROWS.items():
        row = [_cell(name, entry, reasons) for name in columns]
        lines.append(f"| {family} | {' | '.join(row)} |")
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([f"## {title}\n", *lines, "", *notes, *([""] if notes else [])])


def _cell(name: str, entry: str, reasons: dict[str, int]) -> str:
    outcome = outcome_of(name, entry) if name in FEATURES else WORKS
    mark = MARKS[outcome.kind]
    if not outcome.reason:
        return mark
    reason = outcome.reason
    if outcome.kind == "apply again":
        reason += ": a method applied before raises at the next run, until it is applied again"
    return f"{mark} <sup>{reasons.setdefault(reason, len(reasons) + 1)}</sup>"


if __name__ == "__main__":
    FILE.write_text(page())
