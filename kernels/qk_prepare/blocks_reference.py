"""`prepare_blocks` and `prepare_int8` in plain torch: one step after the other."""

import torch
from torch import Tensor

from vdit_sparse.kernels.pool import pool_blocks
from vdit_sparse.kernels.qk_prepare.reference import forward
from vdit_sparse.kernels.quant import Quantized, Smoothed, smooth_quantize
from vdit_sparse.kernels.reorder import reorder


def supports(x: Tensor) -> str | None:
    """None: the reference computes everything that the public functions accept."""
    return None


def pooled(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    order: Tensor | None,
    eps: float,
    round_first: bool,
    block: int,
) -> tuple[Tensor, Tensor]:
    """See `prepare_blocks`; cos and sin: `[R, D]`."""
    rows = _heads(x, weight, cos, sin, eps, round_first)
    means = pool_blocks(rows, block, order=order, backend="torch")
    return _ordered(rows, order).transpose(1, 2).contiguous(), means


def int8(
    query: Tensor,
    key: Tensor,
    weights: tuple[Tensor, Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    order: Tensor | None,
    eps: float,
    round_first: bool,
    blocks: tuple[int, int],
) -> Smoothed:
    """See `prepare_int8`; cos and sin: `[R, D]`."""
    q, k = (
        _ordered(_heads(x, weight, cos, sin, eps, round_first), order)
        for x, weight in zip((query, key), weights, strict=True)
    )
    if order is None:
        return smooth_quantize(q, k, *blocks, backend="reference")
    # Heads may have masked slots in different places.
    real = (order >= 0).expand(q.shape[1], -1)
    heads = [
        smooth_quantize(
            q[:, h : h + 1], k[:, h : h + 1], *blocks, real=real[h : h + 1], backend="reference"
        )
        for h in range(q.shape[1])
    ]
    queries, keys = (
        Quantized(
            torch.cat([part.values for part in parts], 1),
            torch.cat([part.scale for part in parts], 1),
        )
        for parts in ([head.q for head in heads], [head.k for head in heads])
    )
    mean, shift = (torch.cat([getattr(head, name) for head in heads], 1) for name in _SHARED)
    return Smoothed(queries, keys, mean, shift)


_SHARED = ("mean", "shift")


def _heads(x: Tensor, weight: Tensor, cos, sin, eps: float, round_first: bool) -> Tensor:
    """Prepared rows `[B, H, S, D]` in the order of the sequence."""
    rows = forward(x, weight, cos, sin, None, None, None, eps, round_first, x.shape[1])
    return rows.transpose(1, 2)


def _ordered(rows: Tensor, order: Tensor | None) -> Tensor:
    return rows if order is None else reorder(rows, order, backend="torch")
