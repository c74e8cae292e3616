"""Block attention mass in plain torch, some query blocks of a head at a time.

The path of CPU and MPS, and of GPUs that Triton does not know.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from vdit_sparse.kernels.block_sparse.layout import real_keys

SCORES_BUDGET = 16 * 2**20  # bytes of scores held at once


def supports(q: Tensor) -> str | None:
    """None: this backend computes everything that the public function accepts."""
    return None


def forward(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    blocks: tuple[int, int],
    valid: Tensor | None,
    scale: float,
) -> Tensor:
    """See `block_mass`."""
    B, H, S, _ = q.shape
    block_q, block_k = blocks
    nq, nk = -(-S // block_q), -(-S // block_k)
    mass = q.new_empty(B, H, nq, nk, dtype=torch.float32)
    real = None if valid is None else real_keys(S, nk, block_k, valid, None)[0, :S]
    step = max(1, SCORES_BUDGET // (4 * block_q * nk * block_k))
    for b in range(B):
        for h in range(H):
            # A product of 16-bit numbers would be rounded to 16 bits.
            keys = _zeroed(k[b, h].float(), real).T * scale
            for first in range(0, nq, step):
                rows = slice(first * block_q, (first + step) * block_q)
                here = None if real is None else real[rows]
                weights = _weights(q[b, h, rows].float(), keys, lse[b, h, rows], here)
                if real is not None:
                    weights.masked_fill_(~real, 0)
                mass[b, h, first : first + step] = _sums(weights, block_q, block_k)
    return mass


def _zeroed(x: Tensor, real: Tensor | None) -> Tensor:
    """`x` `[S, D]` with zeros in rows that are not real, whatever stood there."""
    return x if real is None else x.masked_fill(~real[:, None], 0)


def _weights(q: Tensor, keys: Tensor, lse: Tensor, real: Tensor | None) -> Tensor:
    """Weights `[rows, S]` of the rows of `q`, 0 where a row does not count; keys `[D, S]`."""
    counted = lse != -torch.inf
    if real is not None:
        counted &= real
    scores = _zeroed(q, counted) @ keys
    return scores.sub_(lse.masked_fill(~counted, torch.inf)[:, None]).exp_()


def _sums(weights: Tensor, block_q: int, block_k: int) -> Tensor:
    """Sums over blocks of the rows and columns of `weights`; the last ones may be ragged."""
    rows, columns = weights.shape
    padded = pad(weights, (0, -columns % block_k, 0, -rows % block_q))
    return padded.unflatten(1, (-1, block_k)).sum(2).unflatten(0, (-1, block_q)).sum(1)
