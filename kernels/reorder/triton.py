"""The Triton backend of `reorder`: one pass, each row read and written once in wide pieces.

The kernel moves bits: rows are seen as the widest integers that divide them. Letters: `B H S D` as
in the public function, D counted in those integers, BD is D rounded up to a power of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdit_sparse.kernels.reorder.layout import INTEGERS, empty_rows, is_token_major
from vdit_sparse.kernels.triton_ops import why_not_on

# Bytes of a program's tile: 128 for each of its 128 threads, eight loads of 16 bytes on their way.
TILE_BYTES = 16 * 1024
LARGEST_TILE = 1024  # rows, for rows of a few bytes


@triton.jit
def reorder_rows(
    x_ptr, order_ptr, out_ptr,
    x_b, x_h, x_s, out_b, out_h, out_s, order_h,
    H, S, slots,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, TOKEN_MAJOR: tl.constexpr,
):  # fmt: skip
    """One program moves ROWS rows of one head; neighbouring programs touch neighbouring memory."""
    tiles = tl.cdiv(slots, ROWS)
    program = tl.program_id(0)
    if TOKEN_MAJOR:
        h, tile, b = program % H, program // H % tiles, program // H // tiles
    else:
        tile, h, b = program % tiles, program // tiles % H, program // tiles // H
    b, h = b.to(tl.int64), h.to(tl.int64)
    to = tile * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BD)
    written = to < slots
    source = tl.load(order_ptr + h * order_h + to, mask=written, other=-1).to(tl.int64)
    read = ((source >= 0) & (source < S))[:, None]
    written = written[:, None]
    if BD != D:
        read = read & (columns < D)[None, :]
        written = written & (columns < D)[None, :]
    rows = x_ptr + b * x_b + h * x_h + source[:, None] * x_s
    values = tl.load(rows + columns[None, :], mask=read, other=0)
    places = out_ptr + b * out_b + h * out_h + to.to(tl.int64)[:, None] * out_s
    tl.store(places + columns[None, :], values, mask=written)


def supports(x: Tensor, order: Tensor) -> str | None:
    """None if this backend computes the call, else the reason why it does not."""
    return why_not_on(x.device)


def forward(x: Tensor, order: Tensor) -> Tensor:
    """See `reorder`."""
    B, H, S, _ = x.shape
    slots = order.shape[-1]
    if order.stride(-1) != 1:
        order = order.contiguous()
    out = empty_rows(x, slots)
    rows, places = _as_integers(x, out)
    D = rows.shape[-1]
    width = triton.next_power_of_2(D)
    tile = max(1, min(TILE_BYTES // (width * rows.itemsize), LARGEST_TILE))
    with torch.cuda.device_of(x):
        reorder_rows[(B * H * triton.cdiv(slots, tile),)](
            rows, order, places,
            *rows.stride()[:3], *places.stride()[:3], order.stride(0) if order.ndim == 2 else 0,
            H, S, slots,
            D=D, BD=width, ROWS=tile, TOKEN_MAJOR=is_token_major(x),
            num_warps=4,
        )  # fmt: skip
    return out


def _as_integers(x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """x and out as the same bits in the widest integers that divide rows, strides and addresses."""
    size = next(size for size in INTEGERS if all(_divides(size, t) for t in (x, out)))
    return x.view(INTEGERS[size]), out.view(INTEGERS[size])


def _divides(size: int, x: Tensor) -> bool:
    """Whether x can be seen as integers of `size` bytes."""
    if size <= x.itemsize:
        return size == x.itemsize
    lengths = (x.shape[-1], *x.stride()[:3], x.storage_offset())
    return x.data_ptr() % size == 0 and all(n * x.itemsize % size == 0 for n in lengths)
