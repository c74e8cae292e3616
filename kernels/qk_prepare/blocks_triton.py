"""The Triton backend of `prepare_blocks` and `prepare_int8`: a program has one block of one head.

Letters: `B S H D` as in the public functions, BD is D rounded up to a power of two, ROWS the tokens
of a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdit_sparse.kernels.qk_prepare.triton import tile_of_heads
from vdit_sparse.kernels.quant import Quantized, Smoothed
from vdit_sparse.kernels.quant.reference import INT8_LARGEST, SMALLEST_SCALE
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
    x_ptr, weight_ptr, norm_ptr, cos_ptr, sin_ptr, order_ptr, mean_ptr,
    rows_ptr, means_ptr, values_ptr, scale_ptr, shift_ptr,
    x_b, x_s, x_h, order_h,
    H, S, slots, rotated, eps, smallest,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
    ROUND_FIRST: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Rows, block means, or INT8 numbers of a block: whichever has a pointer. norm_ptr: of a norm
    over all heads, else each row has its own; cos, sin: `[R, D / 2]`; mean_ptr: the mean key, which
    is taken off, or where there is a shift_ptr (queries) multiplied."""
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
    if rows_ptr is not None:
        places = rows_ptr + ((b.to(tl.int64) * slots + to) * H + h)[:, None] * D
        tl.store(places + columns[None, :], x, mask=written[:, None] & inside)
    x = x.to(tl.float32)
    if means_ptr is not None:
        counted = tl.maximum(tl.sum(real.to(tl.int32), 0), 1).to(tl.float32)
        means = means_ptr + (head * blocks + block) * D
        tl.store(means + columns, tl.sum(x, 0) / counted, mask=columns < D)
    if values_ptr is not None:
        mean = tl.load(mean_ptr + head * D + columns, mask=columns < D, other=0.0)
        if shift_ptr is not None:
            tl.store(shift_ptr + head * slots + to, tl.sum(x * mean[None, :], 1), mask=written)
            x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
        else:
            x = tl.where(real[:, None], x - mean[None, :], 0.0)
        scale = tl.maximum(tl.math.div_rn(tl.max(tl.abs(x)), LARGEST * 1.0), smallest)
        tl.store(scale_ptr + head * blocks + block, scale)
        # Adding 1.5 * 2^23 leaves no bits for fractions: the sum is rounded to nearest even.
        levels = tl.math.div_rn(x, tl.zeros_like(x) + scale) + 12582912.0
        values = (levels - 12582912.0).to(tl.int8)
        first = (head * blocks + block) * ROWS
        places = values_ptr + (first + tl.arange(0, ROWS))[:, None] * D
        tl.store(places + columns[None, :], values, mask=inside)


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
    given = (x, weight, *_halves(cos, sin), _in_one_piece(order), eps, round_first, block)
    _launch(*given, norms=_norms(x, weight, eps), rows=rows, means=means)
    return rows, means


def int8(
    query: Tensor,
    key: Tensor,
    weights: tuple[Tensor, Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    order: Tensor | None,
    eps: float,
    round_first: bool,
    blocks: tuple[int, int],
) -> Smoothed:
    """See `prepare_int8`; cos and sin: `[R, D]`."""
    shared = (*_halves(cos, sin), _in_one_piece(order), eps, round_first)
    queries, keys = ((x, weight, *shared) for x, weight in zip((query, key), weights, strict=True))
    norms = _norms(key, weights[1], eps)
    mean = _mean_key(keys, blocks[1], norms)
    quantized_keys, _ = _quantize(keys, blocks[1], norms, mean, shifted=False)
    norms = _norms(query, weights[0], eps)
    quantized, shift = _quantize(queries, blocks[0], norms, mean, shifted=True)
    return Smoothed(quantized, quantized_keys, mean, shift)


def _mean_key(given: tuple, block: int, norms: Tensor | None) -> Tensor:
    """Mean over the real keys, fp32 `[B, H, D]`, from the means of blocks."""
    x, order = given[0], given[4]
    B, S, H, D = x.shape
    slots = S if order is None else order.shape[-1]
    blocks = triton.cdiv(slots, block)
    means = x.new_empty(B, H, blocks, D, dtype=torch.float32)
    _launch(*given, block, norms=norms, means=means)
    real = torch.ones(1, slots, device=x.device) if order is None else (order >= 0).float()
    real = torch.nn.functional.pad(real.view(-1, slots), (0, blocks * block - slots))
    counted = real.unflatten(-1, (blocks, block)).sum(-1)
    share = counted / counted.sum(-1, keepdim=True).clamp(min=1)
    return (means * share[..., None]).sum(2)


def _quantize(
    given: tuple, block: int, norms: Tensor | None, mean: Tensor, shifted: bool
) -> tuple[Quantized, Tensor | None]:
    x, order = given[0], given[4]
    B, S, H, D = x.shape
    slots = S if order is None else order.shape[-1]
    blocks = triton.cdiv(slots, block)
    values = x.new_empty(B, H, blocks * block, D, dtype=torch.int8)
    scale = x.new_empty(B, H, blocks, dtype=torch.float32)
    shift = x.new_empty(B, H, slots, dtype=torch.float32) if shifted else None
    out = {"values": values, "scale": scale, "shift": shift}
    _launch(*given, block, norms=norms, mean=mean.contiguous(), **out)
    return Quantized(values, scale), shift


def _launch(
    x, weight, cos, sin, order, eps, round_first, block, *,
    norms=None, mean=None, rows=None, means=None, values=None, scale=None, shift=None,
) -> None:  # fmt: skip
    B, S, H, D = x.shape
    slots = S if order is None else order.shape[-1]
    with torch.cuda.device_of(x):
        prepare_tiles[(B * H * triton.cdiv(slots, block),)](
            x, weight.contiguous(), norms, cos, sin, order, mean,
            rows, means, values, scale, shift,
            *x.stride()[:3], order.stride(0) if order is not None and order.ndim == 2 else 0,
            H, S, slots, 0 if cos is None else cos.shape[0], eps, SMALLEST_SCALE,
            D=D, BD=triton.next_power_of_2(D), ROWS=block,
            ROUND_FIRST=round_first, LARGEST=INT8_LARGEST, num_warps=WARPS,
        )  # fmt: skip


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
