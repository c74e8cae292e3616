"""Rows in another order: `[B, H, S, D]` by a token order, one for all heads or one per head.

    reorder(reorder(x, order), inverse(order, S)) is x

`triton.py` is the path of GPUs, one pass at the speed of a copy; `plain.py` is plain torch.
"""

import torch
from torch import Tensor

from vdit_sparse.kernels.backends import choose
from vdit_sparse.kernels.checks import check_inference
from vdit_sparse.kernels.reorder.checks import check_order, check_rows

__all__ = ["BACKENDS", "inverse", "reorder"]

# In the order of preference when none is asked for.
BACKENDS = {
    "triton": "vdit_sparse.kernels.reorder.triton",
    "torch": "vdit_sparse.kernels.reorder.plain",
}


def reorder(x: Tensor, order: Tensor, *, backend: str | None = None) -> Tensor:
    """Row `order[i]` of x at place i, for every batch row and head.

    x: `[B, H, S, D]`, or `[B, H, S]` (an lse), any dtype of 1, 2, 4 or 8 bytes, any strides with
    unit last one; order: int32 or int64 `[S']` or `[H, S']`, new position -> old position, S' of
    any length; -1 gives a row of zeros. backend: "triton" or "torch", which runs or raises; default
    Triton on a GPU, else torch.

    Returns `[B, H, S', D]` or `[B, H, S']`, the same bits, dense, in the memory order of x: a view
    of `[B, S, H, D]` gives one of `[B, S', H, D]`. A position of S or more is a mistake that torch
    reports and that Triton, which cannot, answers with zeros.
    Raises ValueError or TypeError for other shapes and dtypes, RuntimeError under autograd.
    """
    if x.ndim not in (3, 4) or x.numel() == 0:
        raise ValueError(f"x must be [B, H, S, D] or [B, H, S], not empty; got {tuple(x.shape)}.")
    rows = x if x.ndim == 4 else x[..., None]
    check_rows(rows)
    check_order(rows, order)
    check_inference("reorder", x=x)
    out = choose(BACKENDS, backend, rows, order).forward(rows, order)
    return out if x.ndim == 4 else out[..., 0]


def inverse(order: Tensor, tokens: int) -> Tensor:
    """Old position -> new position, int64 `[tokens]` or `[H, tokens]`, of an order of `tokens`
    tokens, int32 or int64 `[S']` or `[H, S']`.

    Slots of -1 are dropped; a token that the order leaves out gets -1, so that `reorder` by the
    inverse gives it zeros.
    """
    order = order.long()
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    # The masked slots all write to one place more, which is then cut off.
    back = order.new_full((*order.shape[:-1], tokens + 1), -1)
    back.scatter_(-1, torch.where(order < 0, tokens, order), places)
    return back[..., :tokens]
