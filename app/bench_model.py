"""Milliseconds of a transformer's forward at full size, dense and sparse, and where they go.

The weights are random. A variant's forwards follow each other as the steps of a run; those that
search for plans, and the first two, are not counted.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path

import torch

from vdit_sparse import apply, remove, summary
from vdit_sparse.app.bench_methods import sparse_methods
from vdit_sparse.app.options import InputError
from vdit_sparse.grid import Grid
from vdit_sparse.kernels.bench.measure import Masked, checked, time_cpu, time_gpu
from vdit_sparse.kernels.bench.problem import Problem
from vdit_sparse.method import SparseAttention
from vdit_sparse.methods import RadialAttention
from vdit_sparse.pipelines.checkpoints import Checkpoint
from vdit_sparse.pipelines.random_model import random_inputs, random_transformer
from vdit_sparse.pipelines.report import Stopwatch

WARM_UP = 2
# Names of the kernels that move rows to a plan's order and back.
MOVERS = ("reorder_rows", "merge_tokens")


@dataclass(frozen=True)
class ModelBench:
    """What to measure: `layers` layers of a model on one video of `video` = height, width, frames.

    methods, precisions: sparse variants are their products; dense: diffusers' backends, of which
    the fastest is the baseline; compiled: also, or for sparse variants only, with compiled blocks;
    kernels: how many of the kernels that take longest to name for each variant.
    """

    size: Checkpoint
    video: tuple[int, int, int]
    layers: int
    device: torch.device
    dtype: torch.dtype
    methods: tuple[str, ...]
    precisions: tuple[str, ...]
    density: float
    block: int
    dense: tuple[str, ...]
    compiled: bool
    rounds: int
    kernels: int = 0

    @property
    def grid(self) -> Grid:
        return self.size.grid(*self.video)


@dataclass(frozen=True)
class Row:
    """One variant; times in milliseconds a forward of the measured layers.

    attention: of all self-attention calls, with plan and reorder in it; plan: building plans;
    reorder: moving rows, None where no profiler says; memory: peak in GiB, weights included;
    speedup: against the fastest dense forward; bound: what Amdahl's law allows, sparse attention
    costing its density of dense attention and nothing else; error: why there are no figures.
    """

    name: str
    ms: float | None = None
    dense: bool = False
    attention: float | None = None
    plan: float | None = None
    reorder: float | None = None
    density: float = 1.0
    memory: float | None = None
    speedup: float | None = None
    bound: float | None = None
    error: str | None = None


class Forwards:
    """One model, its inputs, and the clock of its steps."""

    def __init__(self, bench: ModelBench):
        self.bench, self.watch = bench, Stopwatch()
        self.model = random_transformer(bench.size, bench.layers, bench.device, bench.dtype)
        self.inputs = random_inputs(bench.size, bench.video, bench.device, bench.dtype)

    def run(self, step: int) -> float:
        """Milliseconds of the forward of this step. Raises RuntimeError if its output has numbers
        that are not finite."""
        device = self.bench.device
        timestep = torch.tensor([1000 - step], device=device)
        started = self.watch.start(device)
        with torch.no_grad():
            out = self.model(**self.inputs, timestep=timestep, return_dict=False)[0]
        ms = self.watch.milliseconds(self.watch.stop(started))
        if not bool(out.isfinite().all()):
            raise RuntimeError("the output has numbers that are not finite")
        return ms

    def times(self) -> tuple[list[float], float | None]:
        """Milliseconds of each counted step, and the peak of memory in GiB on a GPU."""
        for step in range(WARM_UP):
            self.run(step)
        on_gpu = self.bench.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.bench.device)
        times = [self.run(WARM_UP + step) for step in range(self.bench.rounds)]
        peak = torch.cuda.max_memory_allocated(self.bench.device) / 2**30 if on_gpu else None
        return times, peak

    def kernels(self) -> dict[str, float]:
        """Milliseconds of each GPU kernel in one more forward; empty on a CPU."""
        if self.bench.device.type != "cuda":
            return {}
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            self.run(WARM_UP + self.bench.rounds)
            torch.cuda.synchronize()
        return {each.key: each.self_device_time_total / 1e3 for each in profiled.key_averages()}


def measure(
    bench: ModelBench, say: Callable[[str], None], keep: Callable[[Row], None] = lambda row: None
) -> list[Row]:
    """Every variant, dense ones first; `say` is told what goes on, and the longest kernels, `keep`
    is given each row as soon as it can be compared. Raises InputError if no dense one runs, for
    there is nothing to compare with."""
    say(f"building {bench.layers} layers")
    forwards = Forwards(bench)
    dense = {(name, "eager"): _eager(forwards, name, say) for name in bench.dense}
    if bench.compiled:
        forwards.model.compile_repeated_blocks(fullgraph=True)
        for name in bench.dense:
            row = _guarded(f"dense {name}, compiled", _dense, forwards, name, say)
            dense[name, "compiled"] = replace(row, attention=dense[name, "eager"].attention)
    timed = {key: row for key, row in dense.items() if row.ms is not None}
    if not timed:
        raise InputError(f"No dense variant runs: {next(iter(dense.values())).error}")
    (backend, _), best = min(timed.items(), key=lambda item: item[1].ms)
    rows = []
    for row in chain(dense.values(), _others(forwards, backend, best, say)):
        rows.append(_judged(row, best))
        keep(rows[-1])
    return rows


def _others(forwards: Forwards, backend: str, best: Row, say) -> Iterator[Row]:
    """Rows by arithmetic, then sparse ones, beside the fastest dense forward."""
    if best.attention is not None:
        rest = best.ms - best.attention
        for name in _bare(forwards.bench):
            yield _by_arithmetic(forwards.bench, name, rest, say)
    forwards.model.set_attention_backend(backend)
    yield from _all_sparse(forwards, say)


def _all_sparse(forwards: Forwards, say: Callable[[str], None]) -> Iterator[Row]:
    """Each method in each precision. They replace each other, so that blocks compile once."""
    bench = forwards.bench
    about = (bench.grid, bench.size.heads, bench.density, bench.block, bench.layers)
    with tempfile.TemporaryDirectory() as folder:
        for name, method in sparse_methods(bench.methods, *about, Path(folder)):
            for precision in bench.precisions:
                variant = f"{name} {precision}" + (", compiled" if bench.compiled else "")
                method = replace(method, precision=precision)
                yield _guarded(variant, _sparse, forwards, method, say)
    remove(forwards.model)


def _guarded(name: str, measured: Callable[..., Row], *arguments) -> Row:
    """The row of one variant, with the reason in the place of figures if it does not run. It is
    told at once, should there be no time for the others."""
    say = arguments[-1]
    try:
        row = measured(name, *arguments)
    # A backend, a compiler or a driver may raise anything; the other variants still count.
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        say(f"{name}: {type(error).__name__}: {said}")
        return Row(name, error=f"{type(error).__name__}: {said}")
    attention = "" if row.attention is None else f", attention {row.attention:.1f}"
    say(f"{name}: {row.ms:.1f} ms{attention}")
    return row


def _eager(forwards: Forwards, backend: str, say: Callable[[str], None]) -> Row:
    """The row of a dense backend, with the time of its self-attention, which our processors read
    off a dense run."""
    row = _guarded(f"dense {backend}, eager", _dense, forwards, backend, say)
    if row.ms is None:
        return row
    method = RadialAttention(dense_layers=forwards.bench.layers, block=forwards.bench.block)
    probed = _guarded(f"attention of {backend}", _through_processors, forwards, method, say)
    remove(forwards.model)
    return replace(row, attention=probed.attention, error=probed.error)


def _dense(name: str, forwards: Forwards, backend: str, say: Callable[[str], None]) -> Row:
    forwards.model.set_attention_backend(backend)
    times, memory = forwards.times()
    if forwards.bench.kernels:
        _name_longest(name, forwards.kernels(), forwards.bench.kernels, say)
    return Row(name, statistics.median(times), dense=True, memory=memory)


def _bare(bench: ModelBench) -> tuple[str, ...]:
    """Dense kernels that are timed by themselves: they need no processor, and see no mask."""
    return ("sdpa-cudnn", "fa3") if bench.device.type == "cuda" else ("sdpa",)


def _by_arithmetic(bench: ModelBench, name: str, rest: float, say: Callable[[str], None]) -> Row:
    """What the fastest dense forward would take with this kernel in the place of its attention."""
    say(f"{name} alone")
    size, on_gpu = bench.size, bench.device.type == "cuda"
    shape = (size.heads, bench.grid.tokens, size.head_dim)
    problem = Problem(*shape, bench.block, bench.dtype, bench.device)
    with torch.no_grad():
        timed = time_gpu if on_gpu else time_cpu
        found, _ = checked(name, problem.tensors(), Masked("dense"), timed)
    label = f"{name}, by arithmetic"
    if found.ms is None:
        return Row(label, error=found.note)
    attention = found.ms * bench.layers
    return Row(label, rest + attention, attention=attention)


def _sparse(name: str, forwards: Forwards, method: SparseAttention, say) -> Row:
    """`_through_processors`, and what a profiler says of one more step."""
    row = _through_processors(name, forwards, method, say)
    kernels = forwards.kernels()
    moved = [ms for kernel, ms in kernels.items() if any(part in kernel for part in MOVERS)]
    _name_longest(name, kernels, forwards.bench.kernels, say)
    return replace(row, reorder=sum(moved) if kernels else None)


def _through_processors(name: str, forwards: Forwards, method: SparseAttention, say) -> Row:
    """The row of a method, as its run says; the times of the steps that count."""
    apply(forwards.model, method, timed=True)
    times, memory = forwards.times()
    steps = _steps(forwards, method)
    ms = [times[step - WARM_UP] for step in steps]
    attention = [sum(entry.milliseconds for entry in entries) for entries in steps.values()]
    plan = [sum(sum(entry.plans) for entry in entries) for entries in steps.values()]
    density = [entry.density for entries in steps.values() for entry in entries]
    return Row(
        name,
        statistics.median(ms),
        attention=statistics.median(attention),
        plan=statistics.median(plan),
        density=statistics.mean(density),
        memory=memory,
    )


def _steps(forwards: Forwards, method: SparseAttention) -> dict[int, list]:
    """The entries of each counted step that is as the method's sparse steps are."""
    grouped: dict[int, list] = {}
    for entry in summary(forwards.model).entries:
        grouped.setdefault(entry.step, []).append(entry)
    wanted = {
        step: entries
        for step, entries in grouped.items()
        if step >= WARM_UP
        and not any(entry.searched for entry in entries)
        and (method.dense_layers > 0 or not any(entry.dense for entry in entries))
    }
    if not wanted:
        raise RuntimeError(f"none of the {forwards.bench.rounds} steps was sparse: try more rounds")
    return wanted


def _judged(row: Row, best: Row) -> Row:
    """The row with its speed-up over the best dense one, and Amdahl's bound."""
    if row.ms is None:
        return row
    bound = None
    if best.attention is not None:
        bound = best.ms / (best.ms - best.attention * (1 - row.density))
    return replace(row, speedup=best.ms / row.ms, bound=bound)


def _name_longest(name: str, kernels: dict[str, float], count: int, say) -> None:
    longest = sorted(kernels.items(), key=lambda item: -item[1])[:count]
    for kernel, ms in longest:
        say(f"  {name}: {ms:9.2f} ms  {kernel[:90]}")


def as_data(rows: list[Row]) -> list[dict]:
    """The rows as plain data."""
    return [asdict(row) for row in rows]
