"""The Triton backend of `pool_blocks`: one program reads the rows of one block of one head.

Letters: `B H S D` as in the public function, BD is D rounded up to a power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdit_sparse.kernels.reorder.layout import is_token_major
from vdit_sparse.kernels.triton_ops import why_not_on

TILE = 4096  # numbers that a program adds at once, 32 for each of its 128 threads


@triton.jit
def pool_rows(
    x_ptr, order_ptr, valid_ptr, out_ptr,
    x_b, x_h, x_s, order_h,
    H, S, slots, nb,
    D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    TOKEN_MAJOR: tl.constexpr,
):  # fmt: skip
    """ROWS partial sums over the block's tiles of ROWS rows, then their sum."""
    program = tl.program_id(0)
    if TOKEN_MAJOR:
        h, block, b = program % H, program // H % nb, program // H // nb
    else:
        block, h, b = program % nb, program // nb % H, program // nb // H
    b, h = b.to(tl.int64), h.to(tl.int64)
    first = block * BLOCK
    end = tl.minimum(first + BLOCK, slots)
    if valid_ptr is not None:
        end = tl.minimum(end, first + tl.load(valid_ptr + block))
    columns = tl.arange(0, BD)
    x_ptr += b * x_b + h * x_h
    sums = tl.zeros([ROWS, BD], tl.float32)
    counted = tl.zeros([ROWS], tl.int32)
    for part in tl.static_range(BLOCK // ROWS):
        source = first + part * ROWS + tl.arange(0, ROWS)
        real = source < end
        if order_ptr is not None:
            source = tl.load(order_ptr + h * order_h + source, mask=real, other=-1)
            real = (source >= 0) & (source < S)
        read = real[:, None]
        if BD != D:
            read = read & (columns < D)[None, :]
        pointers = x_ptr + source.to(tl.int64)[:, None] * x_s + columns[None, :]
        sums += tl.load(pointers, mask=read, other=0.0).to(tl.float32)
        counted += real.to(tl.int32)
    mean = tl.sum(sums, 0) / tl.maximum(tl.sum(counted, 0), 1).to(tl.float32)
    out_ptr += ((b * H + h) * nb + block) * D
    tl.store(out_ptr + columns, mean, mask=columns < D)


def supports(x: Tensor) -> str | None:
    """None if this backend computes the call, else the reason why it does not."""
    return why_not_on(x.device)


def forward(x: Tensor, block: int, nb: int, order: Tensor | None, valid: Tensor | None) -> Tensor:
    """See `pool_blocks`; nb: number of blocks."""
    B, H, S, D = x.shape
    if order is not None and order.stride(-1) != 1:
        order = order.contiguous()
    if valid is not None:
        valid = valid.contiguous()
    out = x.new_empty(B, H, nb, D, dtype=torch.float32)
    width = triton.next_power_of_2(D)
    with torch.cuda.device_of(x):
        pool_rows[(B * H * nb,)](
            x, order, valid, out,
            *x.stride()[:3], order.stride(0) if order is not None and order.ndim == 2 else 0,
            H, S, S if order is None else order.shape[-1], nb,
            D=D, BD=width, BLOCK=block, ROWS=max(1, min(block, TILE // width)),
            TOKEN_MAJOR=is_token_major(x),
            num_warps=4,
        )  # fmt: skip
    return out
