"""Where the rows of `reorder` lie in memory, and their bits as integers."""

import torch
from torch import Tensor

# By bytes: rows are moved as bits, since torch does not move every dtype.
INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def is_token_major(x: Tensor) -> bool:
    """Whether x `[B, H, S, D]` is a view of `[B, S, H, D]`."""
    return x.stride(1) < x.stride(2)


def empty_rows(x: Tensor, tokens: int) -> Tensor:
    """Uninitialised `[B, H, tokens, D]`, dense, in the dtype and memory order of x."""
    B, H, _, D = x.shape
    if is_token_major(x):
        return x.new_empty(B, tokens, H, D).transpose(1, 2)
    return x.new_empty(B, H, tokens, D)
