"""`reorder` in plain torch: no index is ever as large as x."""

import torch
from torch import Tensor

from vdit_sparse.kernels.reorder.layout import INTEGERS, empty_rows, is_token_major


def supports(x: Tensor, order: Tensor) -> str | None:
    """None: this backend computes everything that the public function accepts."""
    return None


def forward(x: Tensor, order: Tensor) -> Tensor:
    """See `reorder`."""
    return _reorder(x.view(INTEGERS[x.itemsize]), order).view(x.dtype)


def _reorder(x: Tensor, order: Tensor) -> Tensor:
    missing = order < 0
    places = order.clamp(min=0)
    if order.ndim == 1 and is_token_major(x):
        # All heads of a token lie together: one copy a token.
        out = x.transpose(1, 2).index_select(1, places).transpose(1, 2)
    else:
        out = empty_rows(x, order.shape[-1])
        for h, head in enumerate(places.expand(x.shape[1], -1)):
            for b in range(x.shape[0]):
                torch.index_select(x[b, h], 0, head, out=out[b, h])
    if bool(missing.any()):
        out.masked_fill_(missing[..., None], 0)
    return out
