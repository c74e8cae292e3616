"""The Triton backend of `prepare_blocks`: a program has one block of one head.

Letters: `B S H D` as in the public functions, BD is D rounded up to a power of two, ROWS the tokens
of a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdit_sparse.kernels.qk_prepare.triton import tile_of_heads
from vdit_sparse.kernels.triton_ops import why_not_on

WARPS = 8


@triton.jit
def inverse_norms(
    x_ptr, out_ptr, x_b, x_s, x_h, S, H, eps,
    D: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """1 / sqrt(mean square + eps) of one token over all its heads, fp32 `[B, S]`."""
    program = tl.program_id(0)
    b, s = (program // S).to(tl.int64), (program % S).to(tl.int64)
    heads, columns = tl.arange(0, BH), tl.arange(0, BD)
    real = (heads < H)[:, None] & (columns < D)[None, :]
    rows = x_ptr + b * x_b + s * x_s + heads[:, None] * x_h
    x = tl.load(rows + columns[None, :], mask=real, other=0.0).to(tl.float32)
    tl.store(out_ptr + program, tl.rsqrt(tl.sum(tl.sum(x * x, 1), 0) / (H * D) + eps))


@triton.jit
def prepare_tiles(
    x_ptr, weight_ptr, norm_ptr, cos_ptr, sin_ptr, order_ptr, rows_ptr, means_ptr,
    x_b, x_s, x_h, order_h, H, S, slots, rotated, eps,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, ROUND_FIRST: tl.constexpr,
):  # fmt: skip
    """Rows and the mean of a block. norm_ptr: of a norm over all heads, else each row has its own;
    cos, sin: `[R, D / 2]`."""
    program = tl.program_id(0)
    blocks = tl.cdiv(slots, ROWS)
    # Neighbouring programs read neighbouring heads of the same tokens.
    h, block, b = program % H, program // H % blocks, program // H // blocks
    head = (b * H + h).to(tl.int64)
    columns, pairs = tl.arange(0, BD), tl.arange(0, BD // 2)
    to = block * ROWS + tl.arange(0, ROWS)
    written = to < slots
    source, real = to.to(tl.int64), written
    if order_ptr is not None:
        order = order_ptr + h.to(tl.int64) * order_h
        source = tl.load(order + to, mask=written, other=-1).to(tl.int64)
        real = written & (source >= 0) & (source < S)
    rows = x_ptr + b.to(tl.int64) * x_b + h.to(tl.int64) * x_h + source[:, None] * x_s
    read = real[:, None] & (columns < D)[None, :]
    stored = tl.load(rows + columns[None, :], mask=read, other=0.0)
    x = stored.to(tl.float32)
    if norm_ptr is not None:
        norm = tl.load(norm_ptr + b.to(tl.int64) * S + source, mask=real, other=0.0)
        weight_ptr += h * D
    else:
        norm = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    x = x * norm[:, None]
    if ROUND_FIRST:
        x = x.to(stored.dtype).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    x = (x * weight[None, :]).to(stored.dtype)
    if cos_ptr is not None:
        turned = (real & (source < rotated))[:, None] & (pairs < D // 2)[None, :]
        at = source[:, None] * (D // 2) + pairs[None, :]
        cos = tl.load(cos_ptr + at, mask=turned, other=1.0)
        sin = tl.load(sin_ptr + at, mask=turned, other=0.0)
        even, odd = tl.split(tl.reshape(x.to(tl.float32), [ROWS, BD // 2, 2]))
        x = tl.join(even * cos - odd * sin, even * sin + odd * cos)
        x = tl.reshape(x, [ROWS, BD]).to(stored.dtype)
    inside = (columns < D)[None, :]
    places = rows_ptr + ((b.to(tl.int64) * slots + to) * H + h)[:, None] * D
    tl.store(places + columns[None, :], x, mask=written[:, None] & inside)
    counted = tl.maximum(tl.sum(real.to(tl.int32), 0), 1).to(tl.float32)
    means = means_ptr + (head * blocks + block) * D
    tl.store(means + columns, tl.sum(x.to(tl.float32), 0) / counted, mask=columns < D)


def supports(x: Tensor) -> str | None:
    """None if this backend computes the call, else the reason why it does not."""
    return why_not_on(x.device)


def pooled(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    order: Tensor | None,
    eps: float,
    round_first: bool,
    block: int,
) -> tuple[Tensor, Tensor]:
    """See `prepare_blocks`; cos and sin: `[R, D]`."""
    B, S, H, D = x.shape
    slots = S if order is None else order.shape[-1]
    rows = x.new_empty(B, slots, H, D)
    means = x.new_empty(B, H, triton.cdiv(slots, block), D, dtype=torch.float32)
    cos, sin, order = *_halves(cos, sin), _in_one_piece(order)
    norms = _norms(x, weight, eps)
    with torch.cuda.device_of(x):
        prepare_tiles[(B * H * triton.cdiv(slots, block),)](
            x, weight.contiguous(), norms, cos, sin, order, rows, means, *x.stride()[:3],
            order.stride(0) if order is not None and order.ndim == 2 else 0,
            H, S, slots, 0 if cos is None else cos.shape[0], eps,
            D=D, BD=triton.next_power_of_2(D), ROWS=block, ROUND_FIRST=round_first,
            num_warps=WARPS,
        )  # fmt: skip
    return rows, means


def _norms(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """What each token is multiplied by in a norm over all heads, None for one over each head."""
    B, S, H, D = x.shape
    if weight.numel() == D:
        return None
    out = x.new_empty(B, S, dtype=torch.float32)
    with torch.cuda.device_of(x):
        inverse_norms[(B * S,)](x, out, *x.stride()[:3], S, H, eps, **tile_of_heads(H, D))
    return out


def _halves(cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The tables without repetition, `[R, D / 2]`: every head reads them."""
    if cos is None:
        return None, None
    return cos[:, 0::2].contiguous(), sin[:, 1::2].contiguous()


def _in_one_piece(order: Tensor | None) -> Tensor | None:
    return order if order is None or order.stride(-1) == 1 else order.contiguous()
