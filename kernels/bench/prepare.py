"""What one pass before attention gains: norms, RoPE and a plan's order, at the size of a layer."""

from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from vdit_sparse.kernels.bench.measure import Masked, checked, time_gpu
from vdit_sparse.kernels.bench.problem import Problem
from vdit_sparse.kernels.bench.report import line
from vdit_sparse.kernels.qk_prepare import merge_heads, prepare
from vdit_sparse.kernels.qk_prepare.blocks import prepare_blocks
from vdit_sparse.kernels.quant import smooth_quantize
from vdit_sparse.kernels.reorder import inverse, reorder

EPS = 1e-6


def stock(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, across: bool) -> Tensor:
    """Norm and RoPE as a sequence of torch's own operations, x `[B, S, H, D]`, cos and sin
    `[1, S, 1, D]`; the norm over all heads, as Wan's, or over each."""
    heads = x.shape[2]
    rows = x.flatten(2) if across else x
    rows = rms_norm(rows, weight.shape, weight, EPS)
    rows = rows.unflatten(2, (heads, -1)) if across else rows
    even, odd = rows[..., 0::2], rows[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(rows)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out


def passes(problem: Problem) -> Iterator[tuple[str, int, Callable[[], Tensor]]]:
    """(name, bytes that it has to move, call) of each way to bring one of q, k, v to attention, or
    where the name says so q and k in 8 bits."""
    H, S, D, block = problem.heads, problem.tokens, problem.dim, problem.block
    x, attention = (each.transpose(1, 2) for each in problem.tensors()[:2])
    once = x.numel() * x.element_size()
    angles = torch.rand(S, D // 2, device=problem.device) * 6.28
    cos, sin = (f(angles).repeat_interleave(2, -1)[None, :, None] for f in (torch.cos, torch.sin))
    order = _order(problem)
    back = inverse(order, S)
    heads = attention.transpose(1, 2)
    yield "copy", 2 * once, x.clone
    compiled = torch.compile(stock, dynamic=False)
    for across in (True, False):
        weight = torch.ones(H * D if across else D, dtype=x.dtype, device=x.device)
        call, of = (x, weight, cos, sin, across), "all heads" if across else "each head"
        yield f"torch, {of}", 2 * once, lambda call=call: stock(*call)
        yield f"torch compiled, {of}", 2 * once, lambda call=call: compiled(*call)
        given = (x, weight, (cos, sin))
        yield f"one pass, {of}", 2 * once, lambda given=given: prepare(*given, eps=EPS)
        yield (
            f"one pass with an order, {of}",
            2 * once,
            lambda given=given: prepare(*given, eps=EPS, back=back),
        )
        yield (
            f"one pass with an order and block means, {of}",
            2 * once,
            lambda given=given: prepare_blocks(*given, eps=EPS, block=problem.block, order=order)[
                0
            ],
        )
    yield (
        "INT8 of q and k alone",
        3 * once,
        lambda: smooth_quantize(heads, heads, block, block).q.values,
    )
    yield "order alone", 2 * once, lambda: reorder(heads, order)
    yield "rows back", 2 * once, lambda: merge_heads(heads, back)


def run_passes(problem: Problem, density: float) -> None:
    """Prints a line for each pass on a GPU: milliseconds, and TB/s of what has to be moved; then
    what an order costs a call, as a share of its attention. A line that fails says why."""
    for name, moved, call in passes(problem):
        ms = _timed(name, call)
        if ms is not None:
            print(f"{ms:8.3f} ms {moved / ms / 1e9:6.2f} TB/s  {name}", flush=True)
    torch.cuda.empty_cache()
    ms = _timed("an order, there and back", order_of_a_call(problem))
    tensors = problem.tensors()
    masks = {"sdpa-cudnn": None, "triton": problem.mask("random", density)}
    masks |= {"hopper": masks["triton"], "int8_fp8": masks["triton"]}
    for name, mask in masks.items():
        row, _ = checked(
            name, tensors, Masked("dense" if mask is None else "random", mask), time_gpu
        )
        share = "" if None in (ms, row.ms) else f", an order is {ms / row.ms:.2%} of it"
        print(line(asdict(row)) + share, flush=True)


def order_of_a_call(problem: Problem) -> Callable[[], Tensor]:
    """What a plan with an order adds to one attention call: q, k and v there, the output and its
    lse back, and the inverse of the order."""
    tensors = problem.tensors()
    lse = torch.zeros_like(tensors[0][..., 0], dtype=torch.float32)
    order = _order(problem)

    def call() -> Tensor:
        out = [reorder(x, order) for x in tensors][0]
        back = inverse(order, problem.tokens)
        reorder(lse, back)
        return reorder(out, back)

    return call


def _order(problem: Problem) -> Tensor:
    """Another random order for each head, int64 `[H, S]`."""
    device = problem.device
    return torch.stack(
        [torch.randperm(problem.tokens, device=device) for _ in range(problem.heads)]
    )


def _timed(name: str, call: Callable[[], Tensor]) -> float | None:
    """Milliseconds, or None after a line with the reason."""
    try:
        return time_gpu(call)
    # A compiler or a driver may raise anything; the other lines still count.
    except Exception as failed:
        said = " ".join(str(failed).split())[:160]
        print(f"       -                {name}: {type(failed).__name__}: {said}", flush=True)
        return None
