"""Norm, RoPE and order as in `prepare`, with the means of blocks that a plan wants.

    rows, means = prepare_blocks(query, weight, rotary, eps=eps, block=128, order=order)

The means are those of `kernels.pool`, without the rows having to be read in between. The pass does
not quantise: a plan, a dense layer and a spot check want q and k as they are, so they have to be in
memory, and `kernels.quant` reads them from there.
"""

from torch import Tensor

from vdit_sparse.kernels import backends
from vdit_sparse.kernels.block_mask import BLOCK_SIZES
from vdit_sparse.kernels.checks import check_inference
from vdit_sparse.kernels.qk_prepare import Rotary, check_rows, checked_tables
from vdit_sparse.kernels.reorder.checks import check_order

__all__ = ["BACKENDS", "prepare_blocks"]

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


def _check(x: Tensor, weight: Tensor, order: Tensor | None, block: int) -> None:
    check_rows(x, weight, "x", "weight")
    if block not in BLOCK_SIZES:
        raise ValueError(f"A block must be one of {BLOCK_SIZES} tokens, got {block!r}.")
    if order is not None:
        check_order(x.transpose(1, 2), order)
