"""The 8-bit precisions of the Triton backend: INT8 QK, and PV in the inputs' dtype or in fp8.

The loop of `block_sparse_forward` over blocks that `kernels.quant` has quantised: INT8 queries and
keys with one scale per block, summed in int32 (SageAttention, arXiv 2410.02367); where FP8, weights
and values in e4m3, each tile's product added to an fp32 accumulator (SageAttention2, arXiv
2411.10958). Letters as there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.block_sparse.layout import (
    empty_outputs,
    head_strides,
    real_keys,
    why_no_descriptors,
)
from vdit_sparse.kernels.block_sparse.tiles import Tile, architecture, tile_for
from vdit_sparse.kernels.block_sparse.triton import TAIL
from vdit_sparse.kernels.quant import quantize_values, smooth_quantize
from vdit_sparse.kernels.triton_ops import (
    descriptor,
    load_rows,
    load_whole,
    online_softmax,
    shared_strides,
    split_list,
    width_of,
)

SMALLEST_WIDTH = 32  # 8-bit matrix instructions take 32 numbers along the summed dimension
# Zeros have the smallest scale there is: 0 times the -inf of a masked key would be NaN.
SMALLEST_FACTOR = tl.constexpr(1e-30)
LOG2_448 = tl.constexpr(8.807354922057604)  # of the largest number of e4m3


@triton.jit
def _exact_float(scores):
    """fp32 of int32 below 2^22, which 127^2 * D is for D <= 256.

    The bits of 1.5 * 2^23 + x are x added to those of 1.5 * 2^23: two cheap instructions instead of
    a conversion, which shares its unit with the exponentials.
    """
    return (scores + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0


@triton.jit
def _fp8_softmax(scores, acc, peak, total, factor, GUARD: tl.constexpr):
    """`online_softmax` with weights, and so the sum, times 448: `peak` is low by its logarithm."""
    peak_new = tl.maximum(peak, tl.max(scores, 1) * factor - LOG2_448)
    shift = peak_new
    if GUARD:
        shift = tl.where(peak_new == float("-inf"), 0.0, peak_new)
    p = tl.exp2(scores * factor - shift[:, None])
    alpha = tl.exp2(peak - shift)
    return p, acc * alpha[:, None], peak_new, total * alpha + tl.sum(p, 1)


@triton.jit
def _attend_tile(
    q, k, v, factor, inside, acc, peak, total,
    MASKED: tl.constexpr, GUARD: tl.constexpr, FP8: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys; factor: from integer products to scores in log2 units."""
    scores = _exact_float(tl.dot(q, k.T))
    if MASKED:
        scores = tl.where(inside[None, :], scores, float("-inf"))
    if FP8:
        p, acc, peak, total = _fp8_softmax(scores, acc, peak, total, factor, GUARD)
        # Hopper's own fp8 accumulator keeps about 14 bits. Naming the limit keeps Triton from
        # folding the addition into the product where it is not Hopper.
        acc += tl.dot(p.to(tl.float8e4nv), v, max_num_imprecise_acc=v.shape[0])
    else:
        p, acc, peak, total = online_softmax(scores, acc, peak, total, factor, GUARD)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, peak, total


@triton.jit
def _load_channels(base, start, stride, rows, columns, D: tl.constexpr, BD: tl.constexpr):
    """Rows `start + rows` of a matrix that lies transposed, and has them all."""
    pointers = base + start.to(tl.int64) + columns[None, :] * stride + rows[:, None]
    if BD == D:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    return tile


@triton.jit
def int8_forward(
    q_ptr, k_ptr, v_ptr, q_desc, k_desc, v_desc,
    q_scale_ptr, k_scale_ptr, v_scale_ptr, shift_ptr, out_ptr, lse_ptr,
    idx_ptr, cnt_ptr, valid_ptr, kv_len_ptr,
    v_b, v_h, v_s, out_b, out_h, out_s, idx_b, idx_h, idx_q, cnt_b, cnt_h, cnt_q,
    H, S, keys, nq, nk, scale,
    D: tl.constexpr, BD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See `block_sparse_attention` and `kernels.quant`, whose results come in: whole blocks, with
    zeros where no real token is. v_scale_ptr: None if v is not quantised, else v lies transposed
    and v_s is the stride of a channel. q_desc, k_desc, v_desc: tensor descriptors, or None to read
    through pointers; RAGGED: whether a key block may reach past the keys of its batch row."""
    FP8: tl.constexpr = v_scale_ptr is not None
    VALID: tl.constexpr = valid_ptr is not None
    tiles = tl.cdiv(S, BM)
    head = tl.program_id(0) // tiles
    m0 = (tiles - 1 - tl.program_id(0) % tiles) * BM
    b, h = head // H, head % H
    b64, h64, head64 = b.to(tl.int64), h.to(tl.int64), head.to(tl.int64)
    k_ptr += head64 * nk * (BLOCK_K * D)
    v_ptr += b64 * v_b + h64 * v_h
    k_scale_ptr += head64 * nk
    row = m0 // BLOCK_Q
    list_ptr = idx_ptr + b64 * idx_b + h64 * idx_h + row.to(tl.int64) * idx_q
    n = tl.load(cnt_ptr + b64 * cnt_b + h64 * cnt_h + row.to(tl.int64) * cnt_q)
    full = n == nk

    rows_m = tl.arange(0, BM)
    columns = tl.arange(0, BD)
    if q_desc is not None:
        q = q_desc.load([b, h, m0, 0]).reshape([BM, BD])
    else:
        q = load_whole(q_ptr + head64 * nq * (BLOCK_Q * D), m0, D, rows_m, columns, D, BD)
    to_log2 = tl.load(q_scale_ptr + head64 * nq + row) * (scale * 1.4426950408889634)
    acc = tl.zeros([BM, BD], tl.float32)
    peak = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)

    # As in the bf16 kernel, the block that straddles the end of the keys comes first.
    length = keys
    n_whole = n
    if RAGGED:
        if kv_len_ptr is not None:
            length = tl.minimum(keys, tl.maximum(tl.load(kv_len_ptr + b), 0))
        whole = length // BLOCK_K
        n_whole, following = split_list(list_ptr, n, full, whole, 128)
        if following == whole:
            end = length
            if VALID:
                end = tl.minimum(length, whole * BLOCK_K + tl.load(valid_ptr + whole))
            rows_t = tl.arange(0, TAIL)
            factor = tl.maximum(to_log2 * tl.load(k_scale_ptr + whole), SMALLEST_FACTOR)
            for part in tl.range(0, tl.cdiv(end - whole * BLOCK_K, TAIL), num_stages=1):
                start = whole * BLOCK_K + part * TAIL
                k = load_whole(k_ptr, start, D, rows_t, columns, D, BD)
                if FP8:
                    v = _load_channels(v_ptr, start, v_s, rows_t, columns, D, BD)
                else:
                    v = load_rows(v_ptr, start, v_s, rows_t, end, columns, D, BD)
                inside = start + rows_t < end
                acc, peak, total = _attend_tile(
                    q, k, v, factor, inside, acc, peak, total, True, False, FP8, PRECISION
                )

    rows_n = tl.arange(0, BN)
    for i in range(0, n_whole * (BLOCK_K // BN)):
        j = i // (BLOCK_K // BN)
        block = tl.where(full, j, tl.load(list_ptr + j, mask=n != nk, other=0))
        start = block * BLOCK_K + i % (BLOCK_K // BN) * BN
        end = length
        if VALID:
            end = tl.minimum(block * BLOCK_K + tl.load(valid_ptr + block), length)
        if k_desc is not None:
            k = k_desc.load([b, h, start, 0]).reshape([BN, BD])
        else:
            k = load_whole(k_ptr, start, D, rows_n, columns, D, BD)
        if FP8 and v_desc is not None:
            v = v_desc.load([b, h, 0, start]).reshape([BD, BN]).T
        elif FP8:
            v = _load_channels(v_ptr, start, v_s, rows_n, columns, D, BD)
        elif VALID:
            v = load_rows(v_ptr, start, v_s, rows_n, end, columns, D, BD)
        elif v_desc is not None:
            v = v_desc.load([b, h, start, 0]).reshape([BN, BD])
        else:
            v = load_whole(v_ptr, start, v_s, rows_n, columns, D, BD)
        factor = tl.maximum(to_log2 * tl.load(k_scale_ptr + block), SMALLEST_FACTOR)
        inside = start + rows_n < end
        acc, peak, total = _attend_tile(
            q, k, v, factor, inside, acc, peak, total, VALID, VALID, FP8, PRECISION
        )

    real = m0 + rows_m < S
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    if FP8:
        acc *= tl.load(v_scale_ptr + head64 * D + columns, mask=columns < D, other=0.0)[None, :]
    pointers = out_ptr + b64 * out_b + h64 * out_h + m0.to(tl.int64) * out_s
    pointers = pointers + rows_m[:, None] * out_s + columns[None, :]
    tl.store(
        pointers, acc.to(out_ptr.dtype.element_ty), mask=real[:, None] & (columns < D)[None, :]
    )
    row_of = head64 * S + m0 + rows_m
    # ln(sum of exp) from log2 units, and what smoothing the keys took off all scores of the row.
    lse = (peak + tl.log2(total)) * 0.6931471805599453
    lse += scale * tl.load(shift_ptr + row_of, mask=real, other=0.0)
    tl.store(lse_ptr + row_of, lse, mask=real)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float,
    kv_len: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """See `block_sparse_attention`; precision "int8_bf16" or "int8_fp8"."""
    tile = choose_tile(q, v, mask, precision)
    return launch(q, k, v, mask, scale, kv_len, precision, tile)


def choose_tile(q: Tensor, v: Tensor, mask: BlockMask, precision: str) -> Tile:
    """The tile, and with it the path (descriptors or pointers), that `forward` takes."""
    arch, D = architecture(q.device), q.shape[-1]
    if precision == "int8_fp8":
        # What `kernels.quant` writes is aligned, and zero where no real token is.
        descriptors = arch.startswith("sm_") and int(arch[3:]) >= 90 and D in (64, 128)
    else:
        descriptors = mask.valid is None and why_no_descriptors(v=v) is None
    blocks = (mask.block_q, mask.block_k)
    return tile_of(arch, D, v.dtype.itemsize, blocks, descriptors, precision)


def tile_of(
    arch: str, D: int, itemsize: int, blocks: tuple[int, int], descriptors: bool, precision: str
) -> Tile:
    """The tile for v of `itemsize` bytes before it is quantised."""
    size = 2 if precision == "int8_fp8" else itemsize
    return tile_for(arch, width_of(D, SMALLEST_WIDTH), size, blocks, descriptors, precision)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float,
    kv_len: Tensor | None,
    precision: str,
    tile: Tile,
) -> tuple[Tensor, Tensor]:
    """`forward` with a given tile (for the tests)."""
    B, H, S, D = q.shape
    keys = k.shape[2]
    real = real_keys(keys, mask.nk, mask.block_k, mask.valid, kv_len)
    real = None if real is None else real[:, :keys]
    pair = smooth_quantize(q, k, mask.block_q, mask.block_k, real=real)
    values, value_scale = v, None
    if precision == "int8_fp8":
        quantized = quantize_values(v, mask.block_k, real=real)
        values, value_scale = quantized.values, quantized.scale
    idx = mask.idx if mask.idx.stride(-1) == 1 else mask.idx.contiguous()
    out, lse = empty_outputs(q)
    width = width_of(D, SMALLEST_WIDTH)
    with torch.cuda.device_of(q):
        int8_forward[(B * H * triton.cdiv(S, tile.rows),)](
            pair.q.values, pair.k.values, values,
            *_descriptors(pair, values, value_scale is not None, tile, width),
            pair.q.scale, pair.k.scale, value_scale, pair.shift, out, lse,
            idx, mask.cnt, mask.valid, kv_len,
            *head_strides(values), *head_strides(out),
            *shared_strides(idx), *shared_strides(mask.cnt),
            H, S, keys, mask.nq, mask.nk, scale,
            D=D, BD=width, BLOCK_Q=mask.block_q, BLOCK_K=mask.block_k, BM=tile.rows, BN=tile.keys,
            RAGGED=kv_len is not None or keys % mask.block_k != 0,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            **tile.options,
        )  # fmt: skip
    return out, lse


def _descriptors(pair, values: Tensor, fp8: bool, tile: Tile, width: int) -> tuple:
    if not tile.descriptors:
        return None, None, None
    shape = (width, tile.keys) if fp8 else (tile.keys, width)
    return (
        descriptor(pair.q.values, tile.rows, width),
        descriptor(pair.k.values, tile.keys, width),
        descriptor(values, *shape),
    )
