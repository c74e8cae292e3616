"""Exact block attention mass: how much softmax weight each query block gives each key block.

    mass = block_mass(q, k, lse, 128)

The second of the two passes of AdaSpa's online search (arXiv 2502.21079, "Fused online search");
the first is dense attention that returns its LSE. `reference.py` is the specification,
`chunked.py` the path of CPU and MPS, `triton.py` that of GPUs; a backend is a file with
`supports(...) -> reason | None` and `forward(...)`, and a line in `BACKENDS`.
"""

import torch
from torch import Tensor

from vdit_sparse.kernels.backends import choose
from vdit_sparse.kernels.block_mask import BLOCK_SIZES, block_pair
from vdit_sparse.kernels.checks import (
    DTYPES,
    check_inference,
    check_last_stride,
    check_valid,
    checked_scale,
)

__all__ = ["BACKENDS", "block_mass"]

# In the order of preference when none is asked for; the reference is never chosen by itself.
BACKENDS = {
    "triton": "vdit_sparse.kernels.block_mass.triton",
    "chunked": "vdit_sparse.kernels.block_mass.chunked",
    "reference": "vdit_sparse.kernels.block_mass.reference",
}


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block: int | tuple[int, int],
    *,
    valid: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """W[b, h, p, c] = sum over rows r of query block p and keys t of key block c of
    exp(scale * q_r . k_t - lse_r), fp32 `[B, H, nq, nk]`.

    q and k `[B, H, S, D]`, fp16, bf16 or fp32, any strides with unit last one; lse: fp32
    `[B, H, S]`, natural log, as `block_sparse_attention` returns it; block: tokens of a block, 64
    or 128, or a pair (query block, key block);
    valid: int32 `[nk]`, real tokens at the start of each key block and of the query block at the
    same place (so both sizes must be equal); what stands past them counts nothing, whatever it is;
    scale: default D^-0.5; backend: a name in `BACKENDS`, which runs or raises; default Triton on a
    GPU if it takes the call, else chunked.

    With the LSE of full attention W[p] sums over c to the number of real rows of p. With the LSE of
    another step (AdaSpa's cached search) it does not, and exp may overflow to inf where scores have
    grown by more than 88. A row whose lse is -inf, without keys, counts 0.

    All sums and exponentials are fp32. Only the reference holds S x S weights. Inference only:
    raises under autograd. AdaSpa's algorithms print `Log(qk - LSE)`; its code computes exp, and so
    do we. Its code scores the zeros that pad the last block; we mask them.
    """
    _check_tensors(q, k, lse)
    blocks = _check_blocks(q, block, valid)
    scale = checked_scale(scale, q.shape[-1])
    return choose(BACKENDS, backend, q).forward(q, k, lse, blocks, valid, scale)


def _check_tensors(q: Tensor, k: Tensor, lse: Tensor) -> None:
    if q.ndim != 4 or k.shape != q.shape or 0 in q.shape:
        raise ValueError(
            "q and k must both be [B, H, S, D], not empty; got "
            f"{tuple(q.shape)} and {tuple(k.shape)}."
        )
    if q.dtype not in DTYPES or k.dtype != q.dtype:
        raise TypeError(
            f"q and k must have one dtype of fp16, bf16 and fp32, got {q.dtype} and {k.dtype}."
        )
    if lse.shape != q.shape[:3] or lse.dtype != torch.float32:
        raise ValueError(
            f"lse must be float32 {tuple(q.shape[:3])} like the rows of q, got "
            f"{lse.dtype} {tuple(lse.shape)}."
        )
    if k.device != q.device or lse.device != q.device:
        raise ValueError(
            f"q, k and lse must share a device, got {q.device}, {k.device}, {lse.device}."
        )
    check_last_stride(q=q, k=k)
    check_inference("block_mass", q=q, k=k, lse=lse)


def _check_blocks(q: Tensor, block: int | tuple[int, int], valid: Tensor | None) -> tuple[int, int]:
    """(query block, key block), in tokens."""
    blocks = block_pair(block)
    if len(blocks) != 2 or not set(blocks) <= set(BLOCK_SIZES):
        raise ValueError(f"block must be one or two of {BLOCK_SIZES}, got {block}.")
    if valid is None:
        return blocks
    if blocks[0] != blocks[1]:
        raise ValueError(f"valid counts tokens of query and key blocks of one size, got {blocks}.")
    check_valid(valid, -(-q.shape[2] // blocks[1]), q, "q")
    return blocks
