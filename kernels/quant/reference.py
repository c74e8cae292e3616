"""Quantisation in plain torch: the specification."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from vdit_sparse.kernels.quant import EVERY, LARGEST_BALANCE, SAMPLED, Quantized, rotate

INT8_LARGEST = 127
E4M3_LARGEST = 448
# A query's number from here on may leave its dtype when it is balanced.
HUGE = 2.0**124
# Keeps the scale of a block of zeros from being zero.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def supports(x: Tensor, kind: torch.dtype) -> str | None:
    """None: the reference computes everything that the public functions accept."""
    return None


def sampled(tokens: int, device: torch.device) -> Tensor:
    """Which tokens stand for all in the means, bool `[tokens]`: SAMPLED of each EVERY, in each the
    next ones, for rows of an image may be as long as EVERY, and their edge is not like all."""
    token = torch.arange(tokens, device=device)
    return token % EVERY // SAMPLED == token // EVERY % (EVERY // SAMPLED)


def samples(tokens: int) -> int:
    """How many of so many tokens are sampled."""
    whole, rest = divmod(tokens, EVERY)
    return whole * SAMPLED + min(max(rest - whole % (EVERY // SAMPLED) * SAMPLED, 0), SAMPLED)


def mean_and_balance(q: Tensor, k: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean key, 0 without any, and powers of two that make channels of q and k about equally
    strong, both fp32 `[B, H, D]` and of the sampled tokens alone: see `smooth_quantize`."""
    queries, keys = (sampled(x.shape[2], x.device) for x in (q, k))
    q, k = _no_huge(q[:, :, queries].float()), k[:, :, keys].float()
    real = keys.new_ones(1, k.shape[2]) if real is None else real[:, keys]
    count = real.sum(1).clamp(min=1)[:, None, None]
    mean = _real_only(k, real).sum(2) / count
    of_k = _real_only(k - mean[:, :, None], real).square().sum(2) / count
    exponent = (0.25 * (of_k / q.square().mean(2)).log2() + 0.5).floor()
    # Of zeros alone on either side or both, nothing is known.
    exponent = exponent.where(exponent.isfinite(), 0)
    return mean, exponent.clamp(-LARGEST_BALANCE, LARGEST_BALANCE).exp2()


def quantize_queries(
    q: Tensor, block: int, mean: Tensor, balance: Tensor
) -> tuple[Quantized, Tensor]:
    """INT8 queries times balance, and q . mean, see `smooth_quantize`."""
    q = q.float()
    shift = (q @ mean[..., None]).squeeze(-1)
    return _quantize_blocks(rotate(_no_huge(q) * balance[:, :, None]), block), shift


def quantize_keys(
    k: Tensor, block: int, mean: Tensor, balance: Tensor, real: Tensor | None
) -> Quantized:
    """INT8 keys less their mean, divided by balance, see `smooth_quantize`."""
    k = (k.float() - mean[:, :, None]) / balance[:, :, None]
    return _quantize_blocks(rotate(k if real is None else _real_only(k, real)), block)


def quantize_channels(
    v: Tensor, block: int, real: Tensor | None, permuted: bool = False
) -> Quantized:
    """See `quantize_values`."""
    v = v.float() if real is None else _real_only(v, real)
    scale = scale_of(v.abs().amax(2), E4M3_LARGEST)
    # A division for each number would cost a GPU more than all the rest.
    levels = (v * scale.reciprocal()[:, :, None]).clamp(-E4M3_LARGEST, E4M3_LARGEST)
    values = _whole_blocks(levels, block).transpose(2, 3).to(torch.float8_e4m3fn)
    if permuted:
        values = values.unflatten(3, (-1, 2, 4, 2)).transpose(4, 5).flatten(3)
    return Quantized(values.contiguous(), scale)


def scale_of(amax: Tensor, largest: int) -> Tensor:
    """The step that makes `amax` the largest level."""
    # By a tensor: torch multiplies by the reciprocal of a plain number on a GPU, an ulp off.
    return (amax / torch.full_like(amax, largest)).clamp(min=SMALLEST_SCALE)


def _quantize_blocks(x: Tensor, block: int) -> Quantized:
    blocks = _whole_blocks(x, block).unflatten(2, (-1, block))
    scale = scale_of(blocks.abs().amax((3, 4)), INT8_LARGEST)
    values = (blocks * scale.reciprocal()[..., None, None]).round().to(torch.int8)
    return Quantized(values.flatten(2, 3), scale)


def _whole_blocks(x: Tensor, block: int) -> Tensor:
    return pad(x, (0, 0, 0, -x.shape[2] % block))


def _no_huge(q: Tensor) -> Tensor:
    """q with zeros in the place of numbers that are huge or not finite."""
    return torch.where(q.abs() < HUGE, q, 0)


def _real_only(x: Tensor, real: Tensor) -> Tensor:
    """fp32, zero where no real key is."""
    return torch.where(real[:, None, :, None], x.float(), 0)
