"""The specification: dense masked attention, written to be read, not to be fast."""

import torch
from torch import Tensor

from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.block_sparse.layout import empty_outputs, real_keys

SCORES_BUDGET = 2**28  # bytes of scores held at once


def supports(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, precision: str) -> str | None:
    """None: the reference computes everything that the public function accepts."""
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float,
    kv_len: Tensor | None = None,
    *,
    compute: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """See `block_sparse_attention`; all arithmetic in `compute`, rounded once at the end.

    With `compute=torch.float64` and `q` in float64 it is the measuring stick of the tests.
    """
    B, H, S, _ = q.shape
    keys = k.shape[2]
    allowed = mask.token_mask(S, keys)
    real = real_keys(keys, mask.nk, mask.block_k, mask.valid, kv_len)
    if real is not None:
        allowed = allowed & real[:, None, None, :keys]
    allowed = allowed.expand(B, H, S, keys)
    out, lse = empty_outputs(q)
    heads = max(1, SCORES_BUDGET // (S * keys * compute.itemsize))
    for b in range(B):
        for h in range(0, H, heads):
            here = (b, slice(h, h + heads))
            piece, lse[here] = _dense(
                *(x[here].to(compute) for x in (q, k, v)), allowed[here], scale
            )
            out[here] = piece
    return out, lse


def _dense(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q `[H, S, D]`, k and v `[H, keys, D]`, allowed bool `[H, S, keys]`."""
    # Values of keys that no query may see could be anything, and 0 * nan is nan.
    seen = allowed.any(-2)[..., None]
    k, v = (torch.where(seen, x, 0) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~allowed, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse.isinf(), 0, lse)[..., None]).exp()
    return weights @ v, lse
