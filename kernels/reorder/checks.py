"""What `reorder` and `pool_blocks` ask of their inputs."""

import torch
from torch import Tensor

from vdit_sparse.kernels.checks import check_device, check_last_stride
from vdit_sparse.kernels.reorder.layout import INTEGERS


def check_rows(x: Tensor) -> None:
    """Raises unless the rows of x `[B, H, S, D]` lie in one piece each and have whole bytes."""
    if x.dtype.itemsize not in INTEGERS:
        raise TypeError(f"x must have a dtype of 1, 2, 4 or 8 bytes, got {x.dtype}.")
    check_last_stride(x=x)


def check_order(x: Tensor, order: Tensor) -> None:
    """Raises unless order fits x `[B, H, S, D]`."""
    if order.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"order must be int32 or int64, got {order.dtype}.")
    heads = x.shape[1]
    if order.ndim not in (1, 2) or order.numel() == 0 or order.shape[:-1] not in ((), (heads,)):
        raise ValueError(
            f"order must be [S'] or [{heads}, S'] like the heads of x, not empty; got "
            f"{tuple(order.shape)}."
        )
    check_device(order, "order", x, "x")
