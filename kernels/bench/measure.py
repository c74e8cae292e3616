"""Each kernel is compared with exact attention on sampled rows, then timed."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace

import torch
import triton
from torch import Tensor

from vdit_sparse.kernels.bench.kernels import DENSE, KERNELS, Attend
from vdit_sparse.kernels.bench.problem import Problem
from vdit_sparse.kernels.block_mask import BlockMask

SAMPLED_HEADS, SAMPLED_ROWS = 4, 32
ROUNDS = 11  # on a CPU


@dataclass(frozen=True)
class Masked:
    """A mask and what to call it; None: dense. tokens: of its sequence, if not the problem's."""

    pattern: str
    mask: BlockMask | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Row:
    """One result. error: largest error against float64; tflops: of the kept blocks only; note: why
    there are no figures."""

    kernel: str
    pattern: str
    density: float
    ms: float | None = None
    tflops: float | None = None
    error: float | None = None
    note: str | None = None


def masks_of(problem: Problem, patterns: Iterable[str], densities: Iterable[float]) -> list[Masked]:
    """The problem's own masks."""
    return [Masked(p, problem.mask(p, density)) for density in densities for p in patterns]


def run(
    problem: Problem,
    names: Iterable[str],
    masks: Iterable[Masked],
    tell: Callable[[Row], None] = lambda row: None,
    deadline: float = math.inf,
) -> list[Row]:
    """Every kernel on every mask; what cannot run is a row with the reason. A GPU times dense
    kernels once, a CPU with each mask and in turns with the sparse ones. `tell` is given each row
    as soon as it is known. deadline: of `time.monotonic`; no kernel is begun after it."""
    rows = []
    for row in _rows(problem, list(names), masks, deadline):
        tell(row)
        rows.append(row)
    return rows


def _rows(
    problem: Problem, names: list[str], masks: Iterable[Masked], deadline: float
) -> Iterator[Row]:
    on_gpu, tensors = problem.device.type == "cuda", problem.tensors()
    if on_gpu:
        for name in filter(DENSE.__contains__, names):
            yield _in_time(name, tensors, Masked("dense"), deadline)
        names = [name for name in names if name not in DENSE]
    for masked in masks:
        tokens = masked.tokens or problem.tokens
        if tokens != tensors[0].shape[2]:
            tensors = replace(problem, tokens=tokens).tensors()
        if on_gpu:
            for name in names:
                yield _in_time(name, tensors, masked, deadline)
        elif time.monotonic() < deadline:
            yield from _in_turns(names, tensors, masked)
        else:
            yield from (_late(name, _of(name, masked)) for name in names)


def _in_time(name: str, tensors: list[Tensor], masked: Masked, deadline: float) -> Row:
    if time.monotonic() >= deadline:
        return _late(name, masked)
    return checked(name, tensors, masked, time_gpu)[0]


def _of(name: str, masked: Masked) -> Masked:
    """What this kernel takes of a mask."""
    return masked if KERNELS[name].sparse else Masked("dense")


def _late(name: str, masked: Masked) -> Row:
    return replace(_unmeasured(name, masked), note="not begun: the time was up")


def _unmeasured(name: str, masked: Masked) -> Row:
    density = 1.0 if masked.mask is None else round(masked.mask.density(), 4)
    return Row(name, masked.pattern, density)


def checked(
    name: str,
    tensors: list[Tensor],
    masked: Masked,
    timed: Callable[[Attend], float] | None = None,
) -> tuple[Row, Attend | None]:
    """The row of one kernel on one mask, with its time if `timed` says how; and its call."""
    kernel, mask, row = KERNELS[name], masked.mask, _unmeasured(name, masked)
    reason = kernel.why_not(tensors, mask)
    if reason is not None:
        return replace(row, note=reason), None
    try:
        attend = kernel.make(*tensors, mask)
        row = replace(row, error=verify_rows(attend(), tensors, mask, kernel.limit))
        return (row if timed is None else _timed(row, timed(attend), tensors)), attend
    # What other packages raise is not for us to know; the row says it.
    except Exception as failed:
        said = " ".join(str(failed).split())[:160]
        return replace(row, note=f"{type(failed).__name__}: {said}"), None


def _in_turns(names: list[str], tensors: list[Tensor], masked: Masked) -> list[Row]:
    found = [checked(name, tensors, _of(name, masked)) for name in names]
    calls = {row.kernel: attend for row, attend in found if attend is not None}
    times = time_interleaved(calls, ROUNDS)
    return [
        _timed(row, times[row.kernel], tensors) if row.kernel in times else row for row, _ in found
    ]


def _timed(row: Row, ms: float, tensors: list[Tensor]) -> Row:
    return replace(row, ms=ms, tflops=tflops(tensors[0], row.density, ms))


def tflops(q: Tensor, density: float, ms: float) -> float:
    """TFLOP/s on the kept share of q `[1, H, S, D]` against as many keys."""
    _, H, S, D = q.shape
    return 4 * D * H * S * S * density / ms / 1e9


def verify_rows(
    out: Tensor, tensors: list[Tensor], mask: BlockMask | None, limit: float | None = None
) -> float:
    """Largest error of `out` `[1, H, S, D]` on sampled rows against softmax in float64; raises
    RuntimeError if their relative L2 error is above `limit`, or for None if the error is more than
    rounding."""
    generator = torch.Generator().manual_seed(0)
    _, H, S, D = out.shape
    heads = torch.randperm(H, generator=generator)[:SAMPLED_HEADS].tolist()
    rows = torch.randint(S, (SAMPLED_ROWS,), generator=generator)
    # The last block may be ragged, and the last head lies farthest behind.
    rows = torch.cat([rows, torch.tensor([0, S - 1])]).to(out.device)
    expected = torch.stack([_exact_rows(tensors, mask, head, rows) for head in {*heads, H - 1}])
    found = torch.stack([out[0, head, rows] for head in {*heads, H - 1}]).double()
    difference = found - expected
    error = float(difference.abs().max())
    if limit is not None:
        relative = float(difference.norm() / expected.norm())
        if not relative <= limit:
            raise RuntimeError(f"relative error {relative:.2e} (limit {limit:.2e}): not timed")
        return error
    # Two roundings of numbers of the size of the largest output.
    bound = 4 * torch.finfo(out.dtype).eps * float(expected.abs().max()) + 1e-6
    if not error <= bound:
        raise RuntimeError(f"wrong by {error:.2e} (limit {bound:.2e}): not timed")
    return error


def _exact_rows(tensors: list[Tensor], mask: BlockMask | None, head: int, rows: Tensor) -> Tensor:
    """Attention of `rows` of a head, float64 `[rows, D]`; rows without keys give 0."""
    q, k, v = (x[0, head] for x in tensors)
    scores = q[rows].double() @ k.double().T * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~_visible(mask, head, rows, k.shape[0]), -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v.double()


def _visible(mask: BlockMask, head: int, rows: Tensor, keys: int) -> Tensor:
    """Which keys each of `rows` sees, bool `[rows, keys]`."""
    step = int(mask.cnt.shape[1] > 1)
    blocks = rows // mask.block_q
    cnt, idx = mask.cnt[0, head * step, blocks], mask.idx[0, head * step, blocks]
    listed = torch.arange(idx.shape[-1], device=rows.device) < cnt[:, None]
    keep = torch.zeros(len(rows), mask.nk + 1, dtype=torch.bool, device=rows.device)
    # Entries past the count go to a column that is then cut off.
    keep.scatter_(1, torch.where(listed, idx, mask.nk).long(), True)
    keep = keep[:, :-1] | (cnt == mask.nk)[:, None]
    at = torch.arange(keys, device=rows.device)
    visible = keep[:, at // mask.block_k]
    if mask.valid is not None:
        visible = visible & (at % mask.block_k < mask.valid[at // mask.block_k])
    return visible


def time_gpu(attend: Attend) -> float:
    """Median milliseconds on a GPU, the cache emptied before each call."""
    return triton.testing.do_bench(attend, warmup=50, rep=200, return_mode="median")


def time_cpu(attend: Attend) -> float:
    """Median milliseconds on a CPU."""
    return time_interleaved({"": attend}, ROUNDS)[""]


def time_interleaved(calls: dict[str, Attend], rounds: int) -> dict[str, float]:
    """Median milliseconds of each call, taken in turns so that other load hits all alike."""
    seconds = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def as_data(problem: Problem, rows: Iterable[Row]) -> list[dict]:
    """Rows as plain data with the sizes beside them."""
    sizes = {"heads": problem.heads, "tokens": problem.tokens, "dim": problem.dim}
    sizes |= {"block": problem.block, "dtype": str(problem.dtype).removeprefix("torch.")}
    return [asdict(row) | sizes for row in rows]
