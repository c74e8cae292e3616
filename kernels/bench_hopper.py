"""Which forms of the Hopper kernel help? A study, while `kernels/LOG.md` has open questions.

    python -m vdit_sparse.kernels.bench_hopper [--only GROUP ...] [--check] [--csv FILE]

First every form computes a small problem, several at a time; then those that were right are timed
in rounds, in another order each time: a tenth of a second a list, of which the first third is not
counted, because what the card's power limit (700 W) lets a form have depends on what ran before it;
dense attention of cuDNN is among them, with the clock, the power and what holds the clock back
while it works (nvidia-smi), and that of FlashAttention-3 where it is installed. The table at the
end has medians over the rounds, and how far these were apart. All GPU work is done by processes
that are ended and replaced when a form fails or does not come back: that form is a line in the
table, and the exit status is 1. Meant to take under 90 s in all on one H200 and 16 cores. TFLOP/s
count the kept blocks only.
"""

import argparse
import csv
import random
import statistics
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import torch
import triton
from torch import Tensor

from vdit_sparse.kernels.bench.kernels import FA3, KERNELS
from vdit_sparse.kernels.bench.lanes import each
from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.block_sparse.hopper.variants import Variant, variant_for
from vdit_sparse.kernels.block_sparse.layout import empty_outputs
from vdit_sparse.kernels.block_sparse.reference import forward as reference_forward

WIDE = {"heads": 24, "tokens": 32768, "dim": 128}
NARROW = {"heads": 16, "tokens": 45056, "dim": 64}
TURNS, NO_TURNS = {"pingpong": True}, {"pingpong": False}
MARK, NO_MARK = {"landmark": True}, {"landmark": False}
EVEN = [("local", 0.25), ("random", 0.25), ("local", 0.1), ("random", 0.1)]
DENSE = {"cuDNN": "sdpa-cudnn", "FA3": "fa3"}  # names in `bench.kernels`
LARGEST_ERROR = {"bf16": 7e-3, "int8_bf16": 1.6e-2, "int8_fp8": 4.5e-2}
CHECK_SECONDS = 60  # of a small problem with its process's start and compiling; then it is hung
TIME_SECONDS = 30  # of timing one form in one round
ROUNDS = 5
SETTLE_MS, COUNTED_MS = 30, 60  # of a form and list in a round


@dataclass(frozen=True)
class Form:
    """One line of the table: a kernel for blocks of these sizes, and what differs from the default
    form."""

    group: str
    name: str
    dim: int
    blocks: tuple[int, int] = (128, 128)
    precision: str = "bf16"
    changes: tuple[tuple[str, int], ...] = ()

    @property
    def variant(self) -> Variant:
        chosen = variant_for(self.dim, self.blocks, self.precision)
        return replace(chosen, **dict(self.changes))


def forms(groups: list[str]) -> list[Form]:
    """Every form of the groups asked for."""
    # As they are, all four take tiles from a counter, longest lists first; all but the narrow one
    # have the landmark, `int8_fp8` turns.
    wide = [{}, NO_MARK, TURNS]
    narrow = [{}, TURNS, MARK]
    eight = [{}, NO_TURNS, NO_MARK]
    bf16_values = [{}, {"persistent": False}, TURNS]
    found = [_form("wide", 128, changes=change) for change in wide]
    found += [_form("narrow", 64, changes=change) for change in narrow]
    found += [_form("rows", 128, blocks) for blocks in ((64, 128), (64, 64), (128, 64))]
    found += [_form("rows", 128, (64, 128), changes=MARK)]
    found += [_form("eight", 128, precision="int8_fp8", changes=change) for change in eight]
    found += [_form("eight", 128, precision="int8_bf16", changes=change) for change in bf16_values]
    found += [_form("eight", 64, precision="int8_fp8")]
    return [form for form in found if form.group in groups]


def _form(group: str, dim: int, blocks=(128, 128), precision="bf16", changes=None) -> Form:
    items = tuple((changes or {}).items())
    shown = [item for item in items if item[0] not in ("consumers", "registers")]
    words = [
        name if x is True else f"no {name}" if x is False else f"{name} {x}" for name, x in shown
    ]
    return Form(group, ", ".join(words) or "as it is", dim, blocks, precision, items)


def make_mask(heads: int, tokens: int, blocks: tuple[int, int], pattern: str, share: float):
    """A list per head: the nearest blocks in space and time ("local"), any ("random"), or any with
    rows of 16 to 1 in length ("ragged")."""
    nq, nk = (-(-tokens // block) for block in blocks)
    scores = torch.rand(heads, nq, nk, device="cuda")
    lengths = torch.full((heads, nq, 1), share * nk, device="cuda")
    if pattern == "local":
        (row, column), frames = (torch.arange(n, device="cuda") / n for n in (nq, nk)), 16
        frame = (row[:, None] * frames).floor() - (column * frames).floor()
        place = row[:, None] * frames % 1 - column * frames % 1
        scores -= (place * nk / frames).abs() + 2 * frame.abs()
    if pattern == "ragged":
        lengths = 16 ** torch.rand(heads, nq, 1, device="cuda")
        lengths *= share * nk / lengths.mean()
    rank = scores.argsort(-1, descending=True).argsort(-1)
    return BlockMask.from_keep(rank < lengths.round().clamp(1, nk), blocks)


def make_tensors(heads: int, tokens: int, dim: int) -> list[Tensor]:
    """q, k and v as a transformer gives them."""
    shape = (1, tokens, heads, dim)
    return [torch.randn(shape, dtype=torch.bfloat16, device="cuda").transpose(1, 2) for _ in "qkv"]


def check(form: Form) -> str | None:
    """Computes a small problem: None if it is right, else what is wrong. Compiles on the way."""
    from vdit_sparse.kernels.block_sparse.hopper.launch import launch

    torch.manual_seed(0)
    q, k, v = make_tensors(48, 1000, form.dim)
    mask = make_mask(48, 1000, form.blocks, "ragged", 0.4)
    scale = form.dim**-0.5
    out, lse = launch(q, k, v, mask, scale, None, form.precision, form.variant)
    torch.cuda.synchronize()
    expected, expected_lse = reference_forward(*(x.float() for x in (q, k, v)), mask, scale)
    error = float((out.float() - expected).norm() / expected.norm())
    lse_error = float((lse - expected_lse).abs().max())
    right = error <= LARGEST_ERROR[form.precision] and lse_error <= 0.05
    return None if right else f"wrong by {error:.1e}, lse by {lse_error:.1e}"


def milliseconds(call: Callable[[], object]) -> float:
    """Of one call, on average once the clock has settled."""
    call()
    once = _timed(call, 1)
    for _ in range(round(SETTLE_MS / once)):
        call()
    return _timed(call, max(1, round(COUNTED_MS / once)))


def _timed(call: Callable[[], object], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls


@cache
def tensors_of(dim: int) -> list[Tensor]:
    torch.manual_seed(0)
    return make_tensors(**shape_of(dim))


@cache
def mask_of(dim: int, blocks: tuple[int, int], pattern: str, share: float) -> BlockMask:
    torch.manual_seed(0)
    shape = shape_of(dim)
    return make_mask(shape["heads"], shape["tokens"], blocks, pattern, share)


def shape_of(dim: int) -> dict:
    """Heads, tokens and D of what is timed."""
    return WIDE if dim == 128 else NARROW


def time_form(form: Form, mask: BlockMask) -> dict[str, float]:
    """Milliseconds of the kernel and, in 8 bits, of quantising."""
    from vdit_sparse.kernels.block_sparse.hopper.launch import attend, quantized

    q, k, v = tensors_of(form.dim)
    out, lse = empty_outputs(q)
    inputs = quantized(q, k, v, mask, None, form.precision)
    scale = form.dim**-0.5
    kernel = partial(attend, inputs, out, lse, mask, scale, None, form.variant, k.shape[2])
    found = {"ms": milliseconds(kernel)}
    if form.precision != "bf16":
        quantise = partial(quantized, q, k, v, mask, None, form.precision)
        found["quantise_ms"] = milliseconds(quantise)
    return found


def masks_of(form: Form) -> list[tuple[str, float]]:
    """What this form is timed on."""
    if form.group == "wide":
        return [*EVEN, ("ragged", 0.25), ("all", 1.0)]
    return [("local", 0.25), ("random", 0.25), ("ragged", 0.25)][: 2 if form.dim == 64 else 3]


def rows_of(job: tuple[int, Form]) -> list[dict]:
    """The form's lines in one round."""
    _, form = job
    if form.group == "dense":
        return [dense(form)]
    rows = []
    for pattern, share in masks_of(form):
        mask = mask_of(form.dim, form.blocks, pattern, share)
        density = mask.density()
        times = time_form(form, mask)
        rows.append(
            facts(form)
            | {"pattern": pattern, "density": density}
            | rates(shape_of(form.dim), density, times)
        )
    return rows


def facts(form: Form) -> dict:
    return {f.name: getattr(form, f.name) for f in fields(form) if f.name != "changes"}


def rates(shape: dict, density: float, times: dict[str, float]) -> dict[str, float]:
    """Times and TFLOP/s of the kept blocks, in 8 bits also with quantising."""
    flops = 4 * shape["dim"] * shape["heads"] * shape["tokens"] ** 2 * density
    found = times | {"tflops": flops / times["ms"] / 1e9}
    if "quantise_ms" in times:
        found["tflops_with"] = flops / (times["ms"] + times["quantise_ms"]) / 1e9
    return found


def dense(form: Form) -> dict:
    """Dense attention, and the state of the GPU while it works."""
    attend = KERNELS[DENSE[form.name]].make(*tensors_of(form.dim), None)
    ms = milliseconds(attend)
    for _ in range(8):
        attend()
    state = gpu_state()
    place = {"pattern": "all", "density": 1.0}
    return facts(form) | place | rates(shape_of(form.dim), 1.0, {"ms": ms}) | {"gpu": state}


def gpu_state() -> str:
    """Clock, power and, as bits, what holds the clock back."""
    asked = "--query-gpu=clocks.sm,power.draw,clocks_event_reasons.active"
    uuid = torch.cuda.get_device_properties().uuid
    command = ["nvidia-smi", asked, "--format=csv,noheader", "-i", f"GPU-{uuid}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {type(error).__name__}"
    return (done.stdout.strip() or done.stderr.strip())[:90]


def with_dense(every: list[Form]) -> list[Form]:
    """The same, and dense attention for each head size, where it is installed."""
    sizes = dict.fromkeys(form.dim for form in every)
    names = ["cuDNN"] + ["FA3"] * any(map(find_spec, FA3))
    return [*every, *(Form("dense", name, dim) for dim in sizes for name in names)]


def over_rounds(rounds: list[list[dict]]) -> list[dict]:
    """A form's lines with medians of its times; spread: how far the longest is above the
    shortest."""
    found = []
    for same in zip(*rounds, strict=True):
        times = {n: [row[n] for row in same] for n in ("ms", "quantise_ms") if n in same[0]}
        spread = max(times["ms"]) / min(times["ms"]) - 1
        medians = {name: statistics.median(values) for name, values in times.items()}
        row = same[-1] | rates(shape_of(same[0]["dim"]), same[0]["density"], medians)
        found.append(row | {"spread": spread})
    return found


def line(row: dict) -> str:
    """A row of the printed table."""
    blocks = "x".join(map(str, row["blocks"]))
    head = f"{row['group']:6} D={row['dim']:<3} {blocks:7} {row['precision']:9} {row['name']:28}"
    if "note" in row:
        return f"{head} {row['note']}"
    extra = f"  +{100 * row['spread']:.0f} %" if "spread" in row else ""
    extra += f"  {row['tflops_with']:6.1f} with quantising" if "tflops_with" in row else ""
    extra += f"  {row['gpu']}" if "gpu" in row else ""
    return (
        f"{head} {row['pattern']:6} {row['density']:5.3f} {row['ms']:8.3f} ms "
        f"{row['tflops']:6.1f} TFLOP/s{extra}"
    )


def about(_job: None) -> str:
    """The machine and the versions."""
    name = torch.cuda.get_device_name()
    return f"{name}, torch {torch.__version__}, triton {triton.__version__}"


def check_all(every: list[Form], lanes: int) -> dict[Form, str]:
    """The forms that are not right, and why."""
    wrong = {}
    for form, result, fault in each(every, check, lanes, CHECK_SECONDS):
        note = fault or result
        if note is not None:
            wrong[form] = note
        print(line(facts(form) | {"note": note or "right"}), flush=True)
    return wrong


def time_all(every: list[Form], wrong: dict[Form, str]) -> tuple[list[dict], int]:
    """All lines of the table, and how many forms failed; one that fails is in no later round."""
    right = with_dense([form for form in every if form not in wrong])
    found, faults, jobs = {form: [] for form in right}, dict(wrong), deque()
    for count in range(ROUNDS):
        # The card's power limit holds the clock back after hot forms: each has other neighbours.
        random.Random(count).shuffle(right)
        jobs += [(count, form) for form in right]
    for (count, form), rows, fault in each(jobs, rows_of, 1, TIME_SECONDS):
        if fault is None:
            found[form].append(rows)
            for row in rows:
                print(count, line(row), flush=True)
            continue
        faults[form] = f"{fault}, timed"
        for job in [job for job in jobs if job[1] == form]:
            jobs.remove(job)
        print(count, line(facts(form) | {"note": faults[form]}), flush=True)
    table = [facts(form) | {"note": note} for form, note in faults.items()]
    table += [row for rounds in found.values() if rounds for row in over_rounds(rounds)]
    return table, len(faults)


def write_csv(path: Path, rows: list[dict]) -> None:
    names = dict.fromkeys(name for row in rows for name in row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(names))
        writer.writeheader()
        writer.writerows(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    groups = ["wide", "narrow", "rows", "eight"]
    parser.add_argument("--only", nargs="+", choices=groups, default=groups)
    parser.add_argument("--lanes", type=int, default=12, help="small problems at a time")
    parser.add_argument("--check", action="store_true", help="which forms are right, no times")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    ((_, machine, fault),) = each([None], about, 1, CHECK_SECONDS)
    print(machine or fault, flush=True)
    if fault is not None:
        return 1
    every = forms(options.only)
    wrong = check_all(every, options.lanes)
    print(f"{len(every) - len(wrong)} of {len(every)} forms are right", flush=True)
    if options.check:
        return int(bool(wrong))
    rows, failed = time_all(every, wrong)
    print("", *map(line, rows), sep="\n")
    if options.csv is not None:
        write_csv(options.csv, rows)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
