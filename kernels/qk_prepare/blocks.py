"""Norm, RoPE and order as in `prepare`, with what a plan or an 8-bit kernel wants of whole blocks.

    rows, means = prepare_blocks(query, weight, rotary, eps=eps, block=128, order=order)
    smoothed = prepare_int8(query, key, (query_weight, key_weight), rotary, eps=eps, ...)

The means are those of `kernels.pool`, the 8-bit numbers those of `kernels.quant`, without the bf16
rows having to be read, or for 8 bits even written, in between.
"""

from torch import Tensor

from vdit_sparse.kernels import backends
from vdit_sparse.kernels.block_mask import BLOCK_SIZES
from vdit_sparse.kernels.checks import check_inference
from vdit_sparse.kernels.qk_prepare import Rotary, check_rows, checked_tables
from vdit_sparse.kernels.quant import Smoothed
from vdit_sparse.kernels.reorder.checks import check_order

__all__ = ["BACKENDS", "prepare_blocks", "prepare_int8"]

# In the order of preference when none is asked for.
BACKENDS = {
    "triton": "vdit_sparse.kernels.qk_prepare.blocks_triton",
    "reference": "vdit_sparse.kernels.qk_prepare.blocks_reference",
}


def prepare_blocks(
    x: Tensor,
    weight: Tensor,
    rotary: Rotary | None = None,
    *,
    eps: float,
    block: int,
    round_first: bool = False,
    order: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`prepare` and `pool_blocks` in one pass, for a norm over all heads in two.

    x `[B, S, H, D]`, weight, rotary, eps, round_first, backend: as in `prepare`, without a tail;
    block: 64 or 128 tokens; order: int32 or int64 `[S']` or `[H, S']`, as in `reorder`.

    Returns rows, contiguous `[B, S', H, D]` in the dtype of x, those of `prepare`, zero in slots of
    -1; and means, fp32 `[B, H, ceil(S' / block), D]`, of the rounded rows of each block; slots
    of -1 do not count. Raises as `prepare` does.
    """
    _check(x, weight, order, block)
    tables = checked_tables(x, rotary)
    check_inference("prepare_blocks", x=x, weight=weight)
    module = backends.choose(BACKENDS, backend, x)
    return module.pooled(x, weight, *tables, order, eps, round_first, block)


def prepare_int8(
    query: Tensor,
    key: Tensor,
    weights: tuple[Tensor, Tensor],
    rotary: Rotary | None = None,
    *,
    eps: float,
    block_q: int,
    block_k: int,
    round_first: bool = False,
    order: Tensor | None = None,
    backend: str | None = None,
) -> Smoothed:
    """`prepare` of queries and keys, then `smooth_quantize` of both, without bf16 rows in memory.

    query, key: `[B, S, H, D]`, weights: of their norms, and the rest as in `prepare_blocks`;
    block_q, block_k: tokens that share a scale, 64 or 128 each.

    Returns what `smooth_quantize` gives for the prepared rows in this order; slots of -1 count as
    masked. The mean key has to be known before a key is rounded, so the keys are read once more
    than the queries, and both once more for a norm over all heads. Raises as `prepare` does.
    """
    for x, weight, block in ((query, weights[0], block_q), (key, weights[1], block_k)):
        _check(x, weight, order, block)
    if query.shape != key.shape or query.dtype != key.dtype:
        raise ValueError(
            f"query and key must have one shape and dtype, got {query.dtype} "
            f"{tuple(query.shape)} and {key.dtype} {tuple(key.shape)}."
        )
    tables = checked_tables(query, rotary)
    check_inference("prepare_int8", query=query, key=key)
    module = backends.choose(BACKENDS, backend, query)
    return module.int8(query, key, weights, *tables, order, eps, round_first, (block_q, block_k))


def _check(x: Tensor, weight: Tensor, order: Tensor | None, block: int) -> None:
    check_rows(x, weight, "x", "weight")
    if block not in BLOCK_SIZES:
        raise ValueError(f"A block must be one of {BLOCK_SIZES} tokens, got {block!r}.")
    if order is not None:
        check_order(x.transpose(1, 2), order)
