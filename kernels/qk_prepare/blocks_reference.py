"""`prepare_blocks` in plain torch: one step after the other."""

from torch import Tensor

from vdit_sparse.kernels.pool import pool_blocks
from vdit_sparse.kernels.qk_prepare.reference import forward
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


def _heads(x: Tensor, weight: Tensor, cos, sin, eps: float, round_first: bool) -> Tensor:
    """Prepared rows `[B, H, S, D]` in the order of the sequence."""
    rows = forward(x, weight, cos, sin, None, None, None, eps, round_first, x.shape[1])
    return rows.transpose(1, 2)


def _ordered(rows: Tensor, order: Tensor | None) -> Tensor:
    return rows if order is None else reorder(rows, order, backend="torch")
