"""The Triton backend of `qk_prepare`: a program reads all heads of one token once and writes them.

Letters: `B S H D` as in the public functions; BH and BD are H and D rounded up to powers of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdit_sparse.kernels.reorder.layout import INTEGERS
from vdit_sparse.kernels.triton_ops import why_not_on

NUMBERS_A_THREAD = 32


@triton.jit
def prepare_tokens(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, back_ptr, out_ptr,
    x_b, x_s, x_h, cos_s, sin_s, back_h, out_b,
    tokens, first, rotated, slots, H, eps,
    D: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
    ACROSS: tl.constexpr, ROUND_FIRST: tl.constexpr,
):  # fmt: skip
    """Token `s` of x is token `first + s` of the sequence. Pairs lie in one thread, so that taking
    them apart and together moves nothing."""
    program = tl.program_id(0)
    b, s = (program // tokens).to(tl.int64), (program % tokens).to(tl.int64)
    heads, columns = tl.arange(0, BH), tl.arange(0, BD)
    real = (heads < H)[:, None] & (columns < D)[None, :]
    rows = x_ptr + b * x_b + s * x_s + heads[:, None] * x_h
    stored = tl.load(rows + columns[None, :], mask=real, other=0.0)
    x = stored.to(tl.float32)
    if ACROSS:
        mean = tl.sum(tl.sum(x * x, 1), 0) / (H * D)
        x = x * tl.rsqrt(mean + eps)
        weights = weight_ptr + heads[:, None] * D + columns[None, :]
        weight = tl.load(weights, mask=real, other=0.0).to(tl.float32)
    else:
        mean = tl.sum(x * x, 1) / D
        x = x * tl.rsqrt(mean + eps)[:, None]
        weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    if ROUND_FIRST:
        x = x.to(stored.dtype).to(tl.float32)
    x = (x * weight).to(stored.dtype)
    if cos_ptr is not None:
        pairs = tl.arange(0, BD // 2)
        turned = (pairs < D // 2) & (s < rotated)
        # A token without a rotation is turned by nothing.
        cos = tl.load(cos_ptr + s * cos_s + 2 * pairs, mask=turned, other=1.0)[None, :]
        sin = tl.load(sin_ptr + s * sin_s + 2 * pairs + 1, mask=turned, other=0.0)[None, :]
        even, odd = tl.split(tl.reshape(x.to(tl.float32), [BH, BD // 2, 2]))
        x = tl.join(even * cos - odd * sin, even * sin + odd * cos)
        x = tl.reshape(x, [BH, BD]).to(stored.dtype)
    place = tl.full([BH], 0, tl.int64) + first + s
    if back_ptr is not None:
        places = back_ptr + heads * back_h + first + s
        place = tl.load(places, mask=heads < H, other=-1).to(tl.int64)
        real = real & ((place >= 0) & (place < slots))[:, None]
    to = out_ptr + b * out_b + (place * H + heads)[:, None] * D
    tl.store(to + columns[None, :], x, mask=real)


@triton.jit
def merge_tokens(
    x_ptr, back_ptr, out_ptr, x_b, x_h, x_s, back_h, tokens, slots, H,
    D: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """All heads of one token, gathered from their places; rows are bits."""
    program = tl.program_id(0).to(tl.int64)
    b, s = program // tokens, program % tokens
    heads, columns = tl.arange(0, BH), tl.arange(0, BD)
    real = (heads < H)[:, None] & (columns < D)[None, :]
    place = tl.full([BH], 0, tl.int64) + s
    read = real
    if back_ptr is not None:
        place = tl.load(back_ptr + heads * back_h + s, mask=heads < H, other=-1).to(tl.int64)
        read = real & ((place >= 0) & (place < slots))[:, None]
    rows = x_ptr + b * x_b + heads.to(tl.int64)[:, None] * x_h + place[:, None] * x_s
    values = tl.load(rows + columns[None, :], mask=read, other=0)
    to = out_ptr + program * H * D + heads[:, None] * D
    tl.store(to + columns[None, :], values, mask=real)


def supports(x: Tensor) -> str | None:
    """None if this backend computes the call, else the reason why it does not."""
    return why_not_on(x.device)


def forward(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    tail: Tensor | None,
    tail_weight: Tensor | None,
    back: Tensor | None,
    eps: float,
    round_first: bool,
    slots: int,
) -> Tensor:
    """See `prepare`; cos and sin: `[R, D]`."""
    tokens = x.shape[1] + (0 if tail is None else tail.shape[1])
    # Only an order with masked slots leaves places that nobody writes.
    make = x.new_zeros if slots > tokens else x.new_empty
    out = make(x.shape[0], slots, *x.shape[2:])
    back = _rows_in_one_piece(back)
    norm = (back, eps, round_first)
    _launch(x, weight, cos, sin, 0, out, *norm)
    if tail is not None:
        _launch(tail, tail_weight, None, None, x.shape[1], out, *norm)
    return out


def _launch(x, weight, cos, sin, first, out, back, eps, round_first) -> None:
    B, S, H, D = x.shape
    with torch.cuda.device_of(x):
        prepare_tokens[(B * S,)](
            x, weight.contiguous(), cos, sin, back, out,
            *x.stride()[:3],
            0 if cos is None else cos.stride(0), 0 if sin is None else sin.stride(0),
            _head_stride(back), out.stride(0),
            S, first, 0 if cos is None else cos.shape[0], out.shape[1], H, eps,
            ACROSS=weight.numel() == H * D, ROUND_FIRST=round_first, **tile_of_heads(H, D),
        )  # fmt: skip


def merge_heads(x: Tensor, back: Tensor | None) -> Tensor:
    """See `merge_heads` of the package."""
    B, H, slots, D = x.shape
    back = _rows_in_one_piece(back)
    tokens = slots if back is None else back.shape[-1]
    out = x.new_empty(B, tokens, H * D)
    bits = INTEGERS[x.itemsize]
    with torch.cuda.device_of(x):
        merge_tokens[(B * tokens,)](
            x.view(bits), back, out.view(bits), *x.stride()[:3], _head_stride(back),
            tokens, slots, H, **tile_of_heads(H, D),
        )  # fmt: skip
    return out


def _rows_in_one_piece(back: Tensor | None) -> Tensor | None:
    return back if back is None or back.stride(-1) == 1 else back.contiguous()


def _head_stride(back: Tensor | None) -> int:
    """Stride of the heads, 0 where one order is shared."""
    return back.stride(0) if back is not None and back.ndim == 2 else 0


def tile_of_heads(H: int, D: int) -> dict[str, int]:
    heads, width = triton.next_power_of_2(H), max(2, triton.next_power_of_2(D))
    warps = heads * width // (32 * NUMBERS_A_THREAD)
    return {"D": D, "BH": heads, "BD": width, "num_warps": min(8, max(1, warps))}
