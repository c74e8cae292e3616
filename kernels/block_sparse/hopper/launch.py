"""Launching the Hopper kernel: quantisation where asked, descriptors, the grid."""

from functools import cache
from math import log2

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.block_sparse.hopper.kernel import hopper_forward
from vdit_sparse.kernels.block_sparse.hopper.order import longest_first
from vdit_sparse.kernels.block_sparse.hopper.variants import Variant
from vdit_sparse.kernels.block_sparse.layout import (
    all_tiles,
    empty_outputs,
    head_strides,
    real_keys,
)
from vdit_sparse.kernels.quant import quantize_values, smooth_quantize
from vdit_sparse.kernels.triton_ops import shared_strides

NUMBERS = {
    torch.float16: gl.float16,
    torch.bfloat16: gl.bfloat16,
    torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv,
}


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float,
    kv_len: Tensor | None,
    precision: str,
    variant: Variant,
) -> tuple[Tensor, Tensor]:
    """See `block_sparse_attention`, with a given form of the kernel (for the benchmark and the
    tests)."""
    out, lse = empty_outputs(q)
    inputs = quantized(q, k, v, mask, kv_len, precision)
    attend(inputs, out, lse, mask, scale, kv_len, variant, k.shape[2])
    return out, lse


def launch_skipping(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float,
    kv_len: Tensor | None,
    skip_threshold: float,
    variant: Variant,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `skipping_attention`. Values of tiles left out are loaded all the same: the producer runs
    ahead of what decides it."""
    out, lse = empty_outputs(q)
    skips = torch.zeros(*q.shape[:2], mask.nq, mask.nk, dtype=torch.int32, device=q.device)
    inputs = quantized(q, k, v, mask, kv_len, "bf16")
    attend(inputs, out, lse, mask, scale, kv_len, variant, k.shape[2], skips, skip_threshold)
    return out, lse, all_tiles(skips, q.shape[2], mask, 64, variant.keys)


def quantized(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, kv_len: Tensor | None, precision: str
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor | None, ...]]:
    """What the kernel multiplies, and the scales of q, k and v and the shift of the scores."""
    if precision == "bf16":
        return (q, k, v), (None, None, None, None)
    keys = k.shape[2]
    real = real_keys(keys, mask.nk, mask.block_k, mask.valid, kv_len)
    real = None if real is None else real[:, :keys]
    pair = smooth_quantize(q, k, mask.block_q, mask.block_k, real=real)
    value_scale = None
    if precision == "int8_fp8":
        values = quantize_values(v, mask.block_k, real=real, permuted=True)
        v, value_scale = values.values, values.scale
    return (pair.q.values, pair.k.values, v), (pair.q.scale, pair.k.scale, value_scale, pair.shift)


def attend(
    inputs: tuple, out: Tensor, lse: Tensor, mask: BlockMask, scale: float, kv_len: Tensor | None,
    variant: Variant, keys: int, skips: Tensor | None = None, skip_threshold: float = 1.0,
) -> None:  # fmt: skip
    """Attention of what `quantized` gives into out and lse. skips: int32 `[B, H, nq, nk]`, to which
    each tile left out adds 1, or None: none is."""
    (q, k, v), scales = inputs
    B, H, S, D = out.shape
    transposed = v.dtype == torch.float8_e4m3fn
    tiles = B * H * -(-S // variant.rows)
    idx = mask.idx if mask.idx.stride(-1) == 1 else mask.idx.contiguous()
    with torch.cuda.device_of(q):
        order, taken = tile_order(mask, (B, H), variant)
        programs = min(tiles, programs_at_once(variant, q.device)) if variant.persistent else tiles
        hopper_forward[(programs,)](
            descriptor(q, 64, D), descriptor(k, variant.keys, D),
            descriptor(v, *((D, variant.keys) if transposed else (variant.keys, D))),
            descriptor(out, 64, D), *scales, lse, idx, mask.cnt, mask.valid, kv_len, order, taken,
            skips, *shared_strides(idx), *shared_strides(mask.cnt), H, S, keys, mask.nk, tiles,
            scale, log2(skip_threshold), D=D, BLOCK_Q=mask.block_q, BLOCK_K=mask.block_k,
            **variant.constants, **variant.options,
        )  # fmt: skip


def descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor of x `[B, H, ., .]` for tiles of `rows` x `columns`; it reads zeros past the end
    of a head and writes nothing there."""
    strides = [*head_strides(x), 1]
    layout = _layout(rows, columns, x.dtype)
    return TensorDescriptor(x, list(x.shape), strides, [1, 1, rows, columns], layout)


@cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], NUMBERS[dtype])


def tile_order(
    mask: BlockMask, heads: tuple[int, int], variant: Variant
) -> tuple[Tensor | None, Tensor | None]:
    """`order_ptr` and `taken_ptr` of the kernel. The counter belongs to this call alone: calls on
    other streams have their own, and a graph zeroes it each time."""
    order, taken = None, None
    if variant.longest_first:
        order, taken = longest_first(mask, heads)
    elif variant.persistent:
        taken = torch.zeros(1, dtype=torch.int32, device=mask.device)
    return order, taken if variant.persistent else None


def programs_at_once(variant: Variant, device: torch.device) -> int:
    """How many programs the GPU runs at once, as many as a call of the persistent form has."""
    return variant.programs * multiprocessors(device)


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
