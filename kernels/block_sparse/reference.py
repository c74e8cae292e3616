"""The specification: dense masked attention, written to be read, not to be fast."""

from math import log

import torch
from torch import Tensor

from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.block_sparse.layout import empty_outputs, real_keys
from vdit_sparse.kernels.quant import quantize_values, smooth_quantize

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
    precision: str = "bf16",
    *,
    compute: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """See `block_sparse_attention`; all arithmetic in `compute`, rounded once at the end.

    With `compute=torch.float64` and `q` in float64 it is the measuring stick of the tests. The
    8-bit precisions round q, k, v and the weights to the numbers that a kernel would multiply. A
    kernel rounds weights relative to the maximum so far, in its order of the keys; here it is the
    maximum of the row, so that single weights differ by a rounding.
    """
    B, H, S, _ = q.shape
    keys = k.shape[2]
    allowed = mask.token_mask(S, keys)
    real = real_keys(keys, mask.nk, mask.block_k, mask.valid, kv_len)
    if real is not None:
        allowed = allowed & real[:, None, None, :keys]
    allowed = allowed.expand(B, H, S, keys)
    out, lse = empty_outputs(q)
    shift, levels = None, None
    if precision != "bf16":
        levels = torch.float8_e4m3fn if precision == "int8_fp8" else v.dtype
        q, k, v, shift = _rounded(q, k, v, mask, real, precision)
    heads = max(1, SCORES_BUDGET // (S * keys * compute.itemsize))
    for b in range(B):
        for h in range(0, H, heads):
            here = (b, slice(h, h + heads))
            piece, lse[here] = _dense(
                *(x[here].to(compute) for x in (q, k, v)), allowed[here], scale, levels
            )
            out[here] = piece
    return out, lse if shift is None else lse.add_(shift, alpha=scale)


def forward_skipping(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float,
    kv_len: Tensor | None,
    skip_threshold: float,
    *,
    compute: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `skipping_attention`; a tile is a block, and they come in ascending order."""
    top = _largest_scores(q, k, mask, scale, kv_len, compute)
    # A tile left out is below the maximum so far, which therefore does not depend on it.
    before = torch.full_like(top, -torch.inf)
    before[..., 1:] = top.cummax(-1).values[..., :-1]
    below = top < before + log(skip_threshold)
    end = mask.nq * mask.block_q - q.shape[2]
    below = torch.nn.functional.pad(below, (0, 0, 0, end), value=True)
    skipped = below.unflatten(2, (mask.nq, mask.block_q)).all(3) & mask.keep()
    blocks = (mask.block_q, mask.block_k)
    left = BlockMask.from_keep(mask.keep() & ~skipped, blocks, valid=mask.valid)
    return *forward(q, k, v, left, scale, kv_len, compute=compute), skipped


def _largest_scores(
    q: Tensor, k: Tensor, mask: BlockMask, scale: float, kv_len: Tensor | None, compute: torch.dtype
) -> Tensor:
    """Largest scaled score of each query in each key block, `[B, H, S, nk]`; -inf where there is
    none that it may see."""
    B, H, S, _ = q.shape
    keys = k.shape[2]
    allowed = mask.token_mask(S, keys)
    real = real_keys(keys, mask.nk, mask.block_k, mask.valid, kv_len)
    if real is not None:
        allowed = allowed & real[:, None, None, :keys]
    scores = q.to(compute) @ k.to(compute).transpose(-1, -2) * scale
    scores = scores.masked_fill(~allowed, -torch.inf)
    end = mask.nk * mask.block_k - keys
    scores = torch.nn.functional.pad(scores, (0, end), value=-torch.inf)
    return scores.unflatten(3, (mask.nk, mask.block_k)).amax(4)


def _rounded(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, real: Tensor | None, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What 8-bit q, k and v stand for, and what smoothing k took off the products of each query."""
    S, keys = q.shape[2], k.shape[2]
    real = None if real is None else real[:, :keys]
    pair = smooth_quantize(q, k, mask.block_q, mask.block_k, real=real, backend="reference")
    if precision == "int8_fp8":
        values = quantize_values(v, mask.block_k, real=real, backend="reference")
        v = values.dequantize().transpose(2, 3)[:, :, :keys]
    return pair.q.dequantize()[:, :, :S], pair.k.dequantize()[:, :, :keys], v, pair.shift


def _dense(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float, levels: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """q `[H, S, D]`, k and v `[H, keys, D]`, allowed bool `[H, S, keys]`; levels: dtype to which
    weights are rounded, or None."""
    # Values of keys that no query may see could be anything, and 0 * nan is nan.
    seen = allowed.any(-2)[..., None]
    k, v = (torch.where(seen, x, 0) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~allowed, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - torch.where(lse.isinf(), 0, lse)[..., None]).exp()
    if levels is not None:
        weights = _round_weights(weights, levels)
    return weights @ v, lse


def _round_weights(weights: Tensor, levels: torch.dtype) -> Tensor:
    """Weights rounded relative to the largest of their row, which becomes 1, or 448 in e4m3."""
    top = 448.0 if levels == torch.float8_e4m3fn else 1.0
    unit = weights.amax(-1, keepdim=True) / top
    unit = torch.where(unit > 0, unit, 1)
    return (weights / unit).clamp(max=top).to(levels).to(weights.dtype) * unit
