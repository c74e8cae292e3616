"""The Triton backend: one source for NVIDIA Ampere to Blackwell and AMD, and for the interpreter.

One program computes BM queries of one head against all keys and writes their part of W, one row
after the other. BM x BN is the tile, BD is D rounded up to a power of two. A tile may hold several
query blocks; where it is smaller than a block, the sums of the tiles are added up afterwards.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdit_sparse.kernels.block_sparse.layout import head_strides, why_no_descriptors
from vdit_sparse.kernels.block_sparse.tiles import Tile, architecture, tile_for
from vdit_sparse.kernels.triton_ops import (
    LOG2_E,
    descriptor,
    load_rows,
    load_whole,
    why_no_products,
    width_of,
)

LARGEST_ROWS = 128  # queries of a tile, of one or more query blocks


@triton.jit
def _tile_mass(
    q, k, shift, counted, columns_end, scale_log2,
    GROUP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weights of a tile summed over its columns before `columns_end` and each GROUP rows."""
    scores = tl.dot(q, k.T, input_precision=PRECISION)
    weights = tl.exp2(scores * scale_log2 - shift[:, None])
    if MASKED:
        columns = tl.arange(0, k.shape[0])
        weights = tl.where((columns < columns_end)[None, :], weights, 0.0)
    # Rows are dropped after their sums: one selection a row, and garbage stays in its own row.
    rows = tl.where(counted, tl.sum(weights, 1), 0.0)
    return tl.sum(tl.reshape(rows, [q.shape[0] // GROUP, GROUP]), 1)


@triton.jit
def block_mass_forward(
    q_ptr, k_ptr, q_desc, k_desc, lse_ptr, valid_ptr, out_ptr,
    q_b, q_h, q_s, k_b, k_h, k_s,
    H, S, out_rows, out_columns, scale_log2,
    D: tl.constexpr, BD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """See `block_mass`; out: `[B * H, out_rows, out_columns]`, sums over GROUP rows and BN columns.
    q_desc, k_desc: 4-D tensor descriptors, or None to read through pointers; RAGGED: whether the
    last key block reaches past S."""
    tiles = tl.cdiv(out_rows * GROUP, BM)
    # Head-major, so that a head's keys stay in L2.
    head = tl.program_id(0) // tiles
    m0 = tl.program_id(0) % tiles * BM
    b, h = head // H, head % H
    k_ptr += b.to(tl.int64) * k_b + h.to(tl.int64) * k_h
    rows_m = tl.arange(0, BM)
    rows_n = tl.arange(0, BN)
    columns = tl.arange(0, BD)
    if q_desc is not None:
        q = q_desc.load([b, h, m0, 0]).reshape([BM, BD])
    else:
        q_ptr += b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
        q = load_rows(q_ptr, m0, q_s, rows_m, S, columns, D, BD)

    rows = m0 + rows_m
    lse = tl.load(lse_ptr + head.to(tl.int64) * S + rows, mask=rows < S, other=float("-inf"))
    counted = lse != float("-inf")
    if valid_ptr is not None:
        real = tl.load(valid_ptr + rows // BLOCK_Q, mask=rows < S, other=0)
        counted = counted & (rows % BLOCK_Q < real)
    shift = tl.where(counted, lse * 1.4426950408889634, 0.0)

    group = m0 // GROUP + tl.arange(0, BM // GROUP)
    out_ptr += (head.to(tl.int64) * out_rows + group) * out_columns
    whole = out_columns
    if RAGGED:
        whole = S // BN
    end = BN
    for i in range(0, whole):
        start = tl.cast(i * BN, tl.int32)  # the interpreter's range gives plain integers
        if k_desc is not None:
            k = k_desc.load([b, h, start, 0]).reshape([BN, BD])
        else:
            k = load_whole(k_ptr, start, k_s, rows_n, columns, D, BD)
        if valid_ptr is not None:
            end = tl.load(valid_ptr + start // BLOCK_K) - start % BLOCK_K
        mass = _tile_mass(
            q, k, shift, counted, end, scale_log2, GROUP, valid_ptr is not None, PRECISION
        )
        tl.store(out_ptr + i, mass, mask=group < out_rows)
    if RAGGED:
        for i in tl.range(whole, out_columns, num_stages=1):
            start = tl.cast(i * BN, tl.int32)
            if k_desc is not None:
                k = k_desc.load([b, h, start, 0]).reshape([BN, BD])
            else:
                k = load_rows(k_ptr, start, k_s, rows_n, S, columns, D, BD)
            end = S - start
            if valid_ptr is not None:
                end = tl.minimum(end, tl.load(valid_ptr + start // BLOCK_K) - start % BLOCK_K)
            mass = _tile_mass(q, k, shift, counted, end, scale_log2, GROUP, True, PRECISION)
            tl.store(out_ptr + i, mass, mask=group < out_rows)


def supports(q: Tensor) -> str | None:
    """None if this backend computes the call, else the reason why it does not."""
    return why_no_products(q)


def forward(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    blocks: tuple[int, int],
    valid: Tensor | None,
    scale: float,
) -> Tensor:
    """See `block_mass`."""
    descriptors = why_no_descriptors(q=q, k=k) is None
    width = width_of(q.shape[-1])
    tile = choose_tile(architecture(q.device), width, q.dtype.itemsize, blocks[1], descriptors)
    return launch(q, k, lse, blocks, valid, scale, tile)


def choose_tile(arch: str, width: int, itemsize: int, block_k: int, descriptors: bool) -> Tile:
    """The tile that `forward` takes; `width` is D rounded up to a power of two. Without an
    accumulator for the output the tile of attention can be larger where descriptors save the
    addresses: a whole key block, so that nothing is left to add up."""
    tile = tile_for(arch, width, itemsize, (LARGEST_ROWS, block_k), descriptors)
    if itemsize == 4:
        return replace(tile, stages=1)  # the masked tail spills registers otherwise
    if not tile.descriptors:
        return tile
    stages = 3 if width == 64 else 2
    return Tile(LARGEST_ROWS, block_k, block_k // 16, stages, descriptors=True)


def launch(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    blocks: tuple[int, int],
    valid: Tensor | None,
    scale: float,
    tile: Tile,
) -> Tensor:
    """`forward` with a given tile (for tuning and the tests)."""
    B, H, S, D = q.shape
    block_q, block_k = blocks
    nq, nk = -(-S // block_q), -(-S // block_k)
    group = min(tile.rows, block_q)
    rows, columns = nq * (block_q // group), nk * (block_k // tile.keys)
    out = q.new_empty(B, H, rows, columns, dtype=torch.float32)
    width = width_of(D)
    descriptors = (None, None)
    if tile.descriptors:
        descriptors = (descriptor(q, tile.rows, width), descriptor(k, tile.keys, width))
    with torch.cuda.device_of(q):
        block_mass_forward[(B * H * triton.cdiv(rows * group, tile.rows),)](
            q, k, *descriptors, lse.contiguous(), valid, out,
            *head_strides(q), *head_strides(k),
            H, S, rows, columns, scale * LOG2_E,
            D=D, BD=width, BLOCK_Q=block_q, BLOCK_K=block_k, BM=tile.rows, BN=tile.keys,
            GROUP=group, RAGGED=S % block_k != 0,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            **tile.options,
        )  # fmt: skip
    if (rows, columns) != (nq, nk):
        out = out.unflatten(3, (nk, -1)).unflatten(2, (nq, -1)).sum((3, 5))
    return out
