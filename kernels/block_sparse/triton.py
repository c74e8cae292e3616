"""The Triton backend: one source for NVIDIA Ampere to Blackwell and AMD, and for the interpreter.

FlashAttention-2's forward loop (arXiv 2307.08691, algorithm 1) over each query block's list of key
blocks. One program computes BM queries of one head; letters: `B H S D` as in the public function,
BM x BN the tile, BD is D rounded up to a power of two.
"""

from math import log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.block_sparse.layout import (
    all_tiles,
    empty_outputs,
    head_strides,
    why_no_descriptors,
)
from vdit_sparse.kernels.block_sparse.tiles import Tile, architecture, nearest, tile_for
from vdit_sparse.kernels.triton_ops import (
    INTERPRETED,
    LOG2_E,
    descriptor,
    has_e4m3,
    load_rows,
    load_whole,
    online_softmax,
    shared_strides,
    split_list,
    why_no_products,
    width_of,
)

TAIL = tl.constexpr(32)  # keys of a step at the ragged end


@triton.jit
def block_sparse_forward(
    q_ptr, k_ptr, v_ptr, q_desc, k_desc, v_desc, out_ptr, lse_ptr,
    idx_ptr, cnt_ptr, valid_ptr, kv_len_ptr, skips_ptr,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, out_b, out_h, out_s,
    idx_b, idx_h, idx_q, cnt_b, cnt_h, cnt_q,
    H, S, keys, nk, scale_log2, skip_log2,
    D: tl.constexpr, BD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See `block_sparse_attention`. q_desc, k_desc, v_desc: 4-D tensor descriptors, or None to read
    through pointers; RAGGED: whether a key block may reach past the keys of its batch row;
    skips_ptr: int32 `[B, H, nq, nk]`, where tiles left out are counted, or None: none is."""
    tiles = tl.cdiv(S, BM)
    # Head-major, so that a head's keys stay in L2; last rows first, for the dense rows of text.
    head = tl.program_id(0) // tiles
    m0 = (tiles - 1 - tl.program_id(0) % tiles) * BM
    b, h = head // H, head % H
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    k_ptr += b64 * k_b + h64 * k_h
    v_ptr += b64 * v_b + h64 * v_h
    row = m0 // BLOCK_Q
    list_ptr = idx_ptr + b64 * idx_b + h64 * idx_h + row.to(tl.int64) * idx_q
    n = tl.load(cnt_ptr + b64 * cnt_b + h64 * cnt_h + row.to(tl.int64) * cnt_q)
    full = n == nk

    rows_m = tl.arange(0, BM)
    rows_n = tl.arange(0, BN)
    columns = tl.arange(0, BD)
    if q_desc is not None:
        q = q_desc.load([b, h, m0, 0]).reshape([BM, BD])
    else:
        q = load_rows(q_ptr + b64 * q_b + h64 * q_h, m0, q_s, rows_m, S, columns, D, BD)
    acc = tl.zeros([BM, BD], tl.float32)
    peak = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)

    # The block that straddles the end of the keys comes first, in small steps through pointers, so
    # that its masks cost the main loop no registers; the order of the blocks does not matter.
    length = keys
    n_whole = n
    if RAGGED:
        if kv_len_ptr is not None:
            length = tl.minimum(keys, tl.maximum(tl.load(kv_len_ptr + b), 0))
        whole = length // BLOCK_K
        n_whole, following = split_list(list_ptr, n, full, whole, 128)
        if following == whole:
            end = length
            if valid_ptr is not None:
                end = tl.minimum(length, whole * BLOCK_K + tl.load(valid_ptr + whole))
            rows_t = tl.arange(0, TAIL)
            for part in tl.range(0, tl.cdiv(end - whole * BLOCK_K, TAIL), num_stages=1):
                start = whole * BLOCK_K + part * TAIL
                k = load_rows(k_ptr, start, k_s, rows_t, end, columns, D, BD)
                scores = tl.dot(q, k.T, input_precision=PRECISION)
                scores = tl.where((start + rows_t < end)[None, :], scores, float("-inf"))
                p, acc, peak, total = online_softmax(scores, acc, peak, total, scale_log2, False)
                v = load_rows(v_ptr, start, v_s, rows_t, end, columns, D, BD)
                acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)

    rows_n = tl.arange(0, BN)
    for i in range(0, n_whole * (BLOCK_K // BN)):
        j = i // (BLOCK_K // BN)
        block = tl.where(full, j, tl.load(list_ptr + j, mask=n != nk, other=0))
        start = block * BLOCK_K + i % (BLOCK_K // BN) * BN
        if valid_ptr is not None:
            end = tl.minimum(block * BLOCK_K + tl.load(valid_ptr + block), length)
            k = load_rows(k_ptr, start, k_s, rows_n, end, columns, D, BD)
            v = load_rows(v_ptr, start, v_s, rows_n, end, columns, D, BD)
        elif k_desc is not None:
            k = k_desc.load([b, h, start, 0]).reshape([BN, BD])
            v = v_desc.load([b, h, start, 0]).reshape([BN, BD])
        else:
            k = load_whole(k_ptr, start, k_s, rows_n, columns, D, BD)
            v = load_whole(v_ptr, start, v_s, rows_n, columns, D, BD)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        if valid_ptr is not None:
            scores = tl.where((start + rows_n < end)[None, :], scores, float("-inf"))
        if skips_ptr is not None:
            below = tl.max(scores, 1) * scale_log2 < peak + skip_log2
            skip = tl.min((below | (m0 + rows_m >= S)).to(tl.int32), 0) == 1
            count_ptr = skips_ptr + (head.to(tl.int64) * tl.cdiv(S, BLOCK_Q) + row) * nk + block
            tl.atomic_add(count_ptr, 1, mask=skip)
            if not skip:
                p, acc, peak, total = online_softmax(
                    scores, acc, peak, total, scale_log2, valid_ptr is not None
                )
                acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        else:
            p, acc, peak, total = online_softmax(
                scores, acc, peak, total, scale_log2, valid_ptr is not None
            )
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)

    real = m0 + rows_m < S
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    out_ptr += b64 * out_b + h64 * out_h + m0.to(tl.int64) * out_s
    pointers = out_ptr + rows_m[:, None] * out_s + columns[None, :]
    stored = real[:, None]
    if BD != D:
        stored = stored & (columns < D)[None, :]
    tl.store(pointers, acc.to(out_ptr.dtype.element_ty), mask=stored)
    # ln(sum of exp) from log2 units; a row without keys has peak = -inf.
    lse = (peak + tl.log2(total)) * 0.6931471805599453
    tl.store(lse_ptr + head.to(tl.int64) * S + m0 + rows_m, lse, mask=real)


def supports(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, precision: str) -> str | None:
    """None if this backend computes the call, else the reason why it does not."""
    return why_no_products(q) or (why_no_fp8(q.device) if precision == "int8_fp8" else None)


def why_no_fp8(device: torch.device) -> str | None:
    """Why Triton does not multiply e4m3 numbers on `device`, None if it does."""
    arch = architecture(device)
    if INTERPRETED:
        return "Triton's interpreter rounds to e4m3 wrongly"
    if not has_e4m3(arch):
        return f"int8_fp8 needs NVIDIA compute capability 8.9, this is {arch}; use int8_bf16"
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float,
    kv_len: Tensor | None = None,
    precision: str = "bf16",
) -> tuple[Tensor, Tensor]:
    """See `block_sparse_attention`."""
    if precision != "bf16":
        # That module shares functions of this one.
        from vdit_sparse.kernels.block_sparse.int8 import triton as int8

        return int8.forward(q, k, v, mask, scale, kv_len, precision)
    return launch(q, k, v, mask, scale, kv_len, choose_tile(q, k, v, mask))


def forward_skipping(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float,
    kv_len: Tensor | None,
    skip_threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `skipping_attention`. Raises ValueError on Blackwell (sm_100), for which Triton 3.6 does
    not compile a product behind a condition. Reads through pointers: with descriptors the condition
    makes the kernel spill."""
    arch = architecture(q.device)
    if nearest(arch) == "sm_100":
        raise ValueError(f"skip_threshold does not compile for {arch}: leave it out.")
    tile = tile_of(q, mask, descriptors=False)
    skips = torch.zeros(*q.shape[:2], mask.nq, mask.nk, dtype=torch.int32, device=q.device)
    out, lse = launch(q, k, v, mask, scale, kv_len, tile, skips, skip_threshold)
    return out, lse, all_tiles(skips, q.shape[2], mask, tile.rows, tile.keys)


def choose_tile(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tile:
    """The tile, and with it the path (descriptors or pointers), that `forward` takes."""
    descriptors = why_pointers(q, k, v, mask) is None
    return tile_of(q, mask, descriptors)


def tile_of(q: Tensor, mask: BlockMask, descriptors: bool) -> Tile:
    """The tile for this `q` with or without descriptors."""
    blocks = (mask.block_q, mask.block_k)
    width = width_of(q.shape[-1])
    return tile_for(architecture(q.device), width, q.dtype.itemsize, blocks, descriptors)


def why_pointers(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> str | None:
    """Why this call cannot read its tensors through descriptors (TMA), None if it can.

    Whether it does, the tile says: `choose_tile(...).descriptors`.
    """
    reason = why_no_descriptors(q=q, k=k, v=v)
    if reason is None and mask.valid is not None:
        return "key blocks with masked slots inside (`valid`) need masked loads"
    return reason


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float,
    kv_len: Tensor | None,
    tile: Tile,
    skips: Tensor | None = None,
    skip_threshold: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`forward` with a given tile (for the benchmark and the tests). skips: int32 `[B, H, nq, nk]`,
    to which each tile left out adds 1, or None: none is."""
    B, H, S, D = q.shape
    keys = k.shape[2]
    width = width_of(D)
    idx = mask.idx if mask.idx.stride(-1) == 1 else mask.idx.contiguous()
    out, lse = empty_outputs(q)
    descriptors = (None, None, None)
    if tile.descriptors:
        descriptors = [
            descriptor(x, rows, width)
            for x, rows in ((q, tile.rows), (k, tile.keys), (v, tile.keys))
        ]
    with torch.cuda.device_of(q):
        block_sparse_forward[(B * H * triton.cdiv(S, tile.rows),)](
            q, k, v, *descriptors, out, lse, idx, mask.cnt, mask.valid, kv_len, skips,
            *head_strides(q), *head_strides(k), *head_strides(v), *head_strides(out),
            *shared_strides(idx), *shared_strides(mask.cnt),
            H, S, keys, mask.nk, scale * LOG2_E, log2(skip_threshold),
            D=D, BD=width, BLOCK_Q=mask.block_q, BLOCK_K=mask.block_k, BM=tile.rows, BN=tile.keys,
            RAGGED=kv_len is not None or keys % mask.block_k != 0,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            **tile.options,
        )  # fmt: skip
    return out, lse
