"""The specification: all weights at once, written to be read, not to be fast."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from vdit_sparse.kernels.block_sparse.layout import real_keys


def supports(q: Tensor) -> str | None:
    """None: the reference computes everything that the public function accepts."""
    return None


def forward(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    blocks: tuple[int, int],
    valid: Tensor | None,
    scale: float,
    *,
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """See `block_mass`; all arithmetic in `compute`, rounded once at the end.

    With `compute=torch.float64` it is the measuring stick of the tests.
    """
    S = q.shape[2]
    scores = q.to(compute) @ k.to(compute).transpose(-1, -2) * scale
    weights = (scores - lse.to(compute)[..., None]).exp()
    real = torch.ones(S, dtype=torch.bool, device=q.device)
    if valid is not None:
        real = real_keys(S, len(valid), blocks[1], valid, None)[0, :S]
    counted = (real & (lse != -torch.inf))[..., None] & real
    # A weight that does not count could be anything, and 0 * nan is nan.
    weights = torch.where(counted, weights, 0)
    ends = (0, -S % blocks[1], 0, -S % blocks[0])
    tiles = pad(weights, ends).unflatten(3, (-1, blocks[1])).unflatten(2, (-1, blocks[0]))
    return tiles.sum((3, 5)).to(torch.promote_types(compute, torch.float32))
