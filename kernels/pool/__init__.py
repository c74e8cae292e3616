"""Mean rows of blocks, `[B, H, S, D]` -> `[B, H, nb, D]`, in the token order of a plan.

`triton.py` is the path of GPUs, one launch that reads x once; `plain.py` is plain torch.
"""

from torch import Tensor

from vdit_sparse.kernels.backends import choose
from vdit_sparse.kernels.block_mask import BLOCK_SIZES
from vdit_sparse.kernels.checks import DTYPES, check_inference, check_valid
from vdit_sparse.kernels.reorder.checks import check_order, check_rows

__all__ = ["BACKENDS", "pool_blocks"]

# In the order of preference when none is asked for.
BACKENDS = {
    "triton": "vdit_sparse.kernels.pool.triton",
    "torch": "vdit_sparse.kernels.pool.plain",
}


def pool_blocks(
    x: Tensor,
    block: int,
    *,
    order: Tensor | None = None,
    valid: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The mean of the real tokens in each block of `block` consecutive positions.

    x: `[B, H, S, D]`, fp16, bf16 or fp32, any strides with unit last one; block: 64 or 128 tokens;
    order: int32 or int64 `[S']` or `[H, S']` or None, as in `reorder`: the blocks are then those of
    `reorder(x, order)`, which is never made; valid: int32 `[nb]` or None, as in `BlockMask`: real
    tokens at the start of each block. backend: "triton" or "torch", which runs or raises; default
    Triton on a GPU, else torch.

    Returns fp32 `[B, H, nb, D]`, summed in fp32, nb = ceil(S / block), or of S' with an order.
    Slots of -1, past `valid` or past the end do not count, whatever stands there; a block without
    real tokens gives 0. A position of S or more in order is a mistake that torch reports and that
    Triton does not count. Raises ValueError or TypeError for other shapes and dtypes, RuntimeError
    under autograd.
    """
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(f"x must be [B, H, S, D], not empty; got {tuple(x.shape)}.")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be fp16, bf16 or fp32, got {x.dtype}.")
    if block not in BLOCK_SIZES:
        raise ValueError(f"block must be one of {BLOCK_SIZES} tokens, got {block!r}.")
    check_rows(x)
    if order is not None:
        check_order(x, order)
    nb = -(-(x.shape[2] if order is None else order.shape[-1]) // block)
    if valid is not None:
        check_valid(valid, nb, x, "x")
    check_inference("pool_blocks", x=x)
    return choose(BACKENDS, backend, x).forward(x, block, nb, order, valid)
