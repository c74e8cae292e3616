"""Milliseconds of a transformer's forward at full size, dense and sparse, and where they go.

The weights are random. A variant's forwards follow each other as the steps of a run; those that
search for plans, and the first two, are not counted.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from vdit_sparse import apply, remove, summary
from vdit_sparse.app.options import InputError
from vdit_sparse.calibration import CalibratedAttention, Calibration, save
from vdit_sparse.eval.speed import methods, random_calibration
from vdit_sparse.grid import Grid
from vdit_sparse.method import SparseAttention
from vdit_sparse.methods import RadialAttention
from vdit_sparse.pipelines.families import family_of
from vdit_sparse.pipelines.random_model import (
    ModelSize,
    random_inputs,
    random_transformer,
)
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

    size: ModelSize
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


def measure(bench: ModelBench, say: Callable[[str], None]) -> list[Row]:
    """Every variant, dense ones first; `say` is told what goes on, and the longest kernels."""
    say(f"building {bench.layers} layers")
    forwards = Forwards(bench)
    rows = [_guarded(f"dense {name}, eager", _dense, forwards, name, say) for name in bench.dense]
    rows[0] = _with_attention(rows[0], forwards, say)
    attention = rows[0].attention
    if bench.compiled:
        forwards.model.compile_repeated_blocks(fullgraph=True)
        rows += [
            replace(
                _guarded(f"dense {name}, compiled", _dense, forwards, name, say),
                attention=attention,
            )
            for name in bench.dense
        ]
    best = min((row for row in rows if row.ms is not None), key=lambda row: row.ms, default=None)
    if best is None:
        raise InputError(f"No dense variant runs: {rows[0].error}")
    with tempfile.TemporaryDirectory() as folder:
        for name, method in _variants(bench, Path(folder)):
            rows.append(_guarded(name, _sparse, forwards, method, say))
    return [_judged(row, best, attention) for row in rows]


def _guarded(name: str, measured: Callable[..., Row], *arguments) -> Row:
    """The row of one variant, with the reason in the place of figures if it does not run."""
    arguments[-1](name)
    try:
        return measured(name, *arguments)
    except (ImportError, RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        said = " ".join(str(error).split())[:200]
        return Row(name, error=f"{type(error).__name__}: {said}")


def _dense(name: str, forwards: Forwards, backend: str, say: Callable[[str], None]) -> Row:
    forwards.model.set_attention_backend(backend)
    times, memory = forwards.times()
    _name_longest(name, forwards.kernels(), forwards.bench.kernels, say)
    return Row(name, statistics.median(times), dense=True, memory=memory)


def _with_attention(row: Row, forwards: Forwards, say: Callable[[str], None]) -> Row:
    """The row with the time of its self-attention, which our processors read off a dense run."""
    if row.ms is None:
        return row
    say("share of dense attention")
    dense = RadialAttention(dense_layers=forwards.bench.layers, block=forwards.bench.block)
    probed = _guarded("", _through_processors, forwards, dense, say)
    return replace(row, attention=probed.attention, error=probed.error)


def _sparse(name: str, forwards: Forwards, method: SparseAttention, say) -> Row:
    row, kernels = _profiled(name, forwards, method)
    moved = [ms for kernel, ms in kernels.items() if any(part in kernel for part in MOVERS)]
    _name_longest(name, kernels, forwards.bench.kernels, say)
    return replace(row, reorder=sum(moved) if kernels else None)


def _through_processors(name: str, forwards: Forwards, method: SparseAttention, say) -> Row:
    return _profiled(name, forwards, method, profiled=False)[0]


def _profiled(
    name: str, forwards: Forwards, method: SparseAttention, profiled: bool = True
) -> tuple[Row, dict[str, float]]:
    family_of(forwards.model)
    apply(forwards.model, method, timed=True)
    try:
        times, memory = forwards.times()
        steps = _steps(forwards, method)
        kernels = forwards.kernels() if profiled else {}
    finally:
        remove(forwards.model)
    ms = [times[step - WARM_UP] for step in steps]
    attention = [sum(entry.milliseconds for entry in entries) for entries in steps.values()]
    plan = [sum(sum(entry.plans) for entry in entries) for entries in steps.values()]
    density = [entry.density for entries in steps.values() for entry in entries]
    row = Row(
        name,
        statistics.median(ms),
        attention=statistics.median(attention),
        plan=statistics.median(plan),
        density=statistics.mean(density),
        memory=memory,
    )
    return row, kernels


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


def _variants(bench: ModelBench, folder: Path) -> Iterator[tuple[str, SparseAttention]]:
    """Each method near the density without dense steps or layers, in each precision."""
    for name, method in methods(bench.density, bench.block):
        if name not in bench.methods:
            continue
        method = replace(
            method, dense_steps=0, last_dense_steps=0, dense_layers=0, last_dense_layers=0
        )
        if isinstance(method.refresh, tuple):
            # Listed steps may be fractions of a number that a bare transformer does not know.
            method = replace(method, refresh="once")
        if isinstance(method, CalibratedAttention):
            method = replace(method, calibration=_calibration_file(name, bench, folder))
        suffix = ", compiled" if bench.compiled else ""
        for precision in bench.precisions:
            yield f"{name} {precision}{suffix}", replace(method, precision=precision)


def _calibration_file(name: str, bench: ModelBench, folder: Path) -> str:
    """A random calibration in a file, the same for all layers."""
    about = (name, bench.grid, bench.size.heads, bench.density, bench.block)
    one: Calibration = random_calibration(*about)
    # The axis of layers: the first of an order, the second of what depends on the step too.
    tensors = {
        key: tensor.expand(bench.layers, -1)
        if key.endswith(".order")
        else tensor.expand(tensor.shape[0], bench.layers, *tensor.shape[2:])
        if tensor.ndim > 1
        else tensor
        for key, tensor in one.tensors.items()
    }
    path = str(folder / f"{name}.safetensors")
    save(replace(one, path=path, layers=bench.layers, tensors=tensors))
    return path


def _judged(row: Row, best: Row, attention: float | None) -> Row:
    """The row with its speed-up over the best dense one, and Amdahl's bound."""
    if row.ms is None:
        return row
    bound = None
    if attention is not None:
        bound = best.ms / (best.ms - attention * (1 - row.density))
    return replace(row, speedup=best.ms / row.ms, bound=bound)


def _name_longest(name: str, kernels: dict[str, float], count: int, say) -> None:
    longest = sorted(kernels.items(), key=lambda item: -item[1])[:count]
    for kernel, ms in longest:
        say(f"  {name}: {ms:9.2f} ms  {kernel[:90]}")


def as_data(rows: list[Row]) -> list[dict]:
    """The rows as plain data."""
    return [asdict(row) for row in rows]
