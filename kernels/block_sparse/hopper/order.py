"""In which order the Hopper kernel computes a head's tiles: found in one small launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.triton_ops import shared_strides

ROWS = 64


@triton.jit(do_not_specialize=("cnt_b", "cnt_h", "cnt_q", "H", "nq"))
def _longest_first(
    cnt_ptr, order_ptr, taken_ptr, cnt_b, cnt_h, cnt_q, H, nq, ROWS: tl.constexpr
):  # fmt: skip
    """The place of each of ROWS query blocks of a head: how many come before it."""
    head = tl.program_id(0).to(tl.int64)
    cnt_ptr += head // H * cnt_b + head % H * cnt_h
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    length = tl.load(cnt_ptr + row.to(tl.int64) * cnt_q, mask=row < nq, other=0)
    place = tl.zeros([ROWS], tl.int32)
    for first in tl.range(0, nq, ROWS):
        other = first + tl.arange(0, ROWS)
        lengths = tl.load(cnt_ptr + other.to(tl.int64) * cnt_q, mask=other < nq, other=-1)
        longer = lengths[None, :] > length[:, None]
        # Of equal ones the last comes first, as in the kernel without an order.
        later = (lengths[None, :] == length[:, None]) & (other[None, :] > row[:, None])
        place += tl.sum((longer | later).to(tl.int32), 1)
    tl.store(order_ptr + head * nq + place, row, mask=row < nq)
    if (head == 0) & (tl.program_id(1) == 0):
        tl.store(taken_ptr, 0)


def longest_first(mask: BlockMask, heads: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Query blocks of each of (B, H) heads by falling number of key blocks, int32 `[B * H * nq]`;
    and a counter of zero, int32 `[1]`, from which programs take tiles."""
    B, H = heads
    order = torch.empty(B * H * mask.nq, dtype=torch.int32, device=mask.device)
    taken = torch.empty(1, dtype=torch.int32, device=mask.device)
    _longest_first[(B * H, triton.cdiv(mask.nq, ROWS))](
        mask.cnt, order, taken, *shared_strides(mask.cnt), H, mask.nq, ROWS=ROWS
    )
    return order, taken
