"""Quantisation of q, k and v to 8 bits, for kernels that multiply such numbers.

    pair = smooth_quantize(q, k, 128, 128)
    values = quantize_values(v, 128)

`reference.py` is the specification in plain torch, `triton.py` with `moments.py` the path of GPUs.
This room only quantises; `kernels.block_sparse` multiplies.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vdit_sparse.kernels.backends import choose
from vdit_sparse.kernels.checks import DTYPES, check_device, check_last_stride

__all__ = [
    "BACKENDS",
    "Quantized",
    "Smoothed",
    "channels_of",
    "quantize_values",
    "rotate",
    "smooth_quantize",
]

# In the order of preference when none is asked for.
BACKENDS = {
    "triton": "vdit_sparse.kernels.quant.triton",
    "reference": "vdit_sparse.kernels.quant.reference",
}


# Tokens that stand for all in the mean key and in how strong channels are: SAMPLED of each EVERY
# (`reference.sampled`).
SAMPLED, EVERY = 8, 64
LARGEST_BALANCE = 3  # exponent


@dataclass(frozen=True, eq=False)
class Quantized:
    """8-bit numbers and the steps between them; contiguous.

    values: int8 or float8_e4m3fn `[B, H, rows, columns]`.
    scale: fp32 `[B, H, groups]`, one for each group of `rows / groups` consecutive rows.
    """

    values: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """What the numbers stand for, fp32, shape of `values`."""
        groups = self.values.float().unflatten(2, (self.scale.shape[2], -1))
        return (groups * self.scale[..., None, None]).flatten(2, 3)


@dataclass(frozen=True, eq=False)
class Smoothed:
    """Queries and keys of an attention call, quantised after the mean key was taken off the keys,
    channels of both were balanced, and both were rotated (`rotate`).

    q, k: `Quantized`, int8 `[B, H, blocks * block, D]` with a scale per block, zero in the slots
        past the end and in masked ones.
    mean: fp32 `[B, H, D]`, about the mean key, neither balanced nor rotated.
    balance: fp32 `[B, H, D]`, powers of two by which q was multiplied and k divided.
    shift: fp32 `[B, H, S]`, q . mean, what each query's products with all keys have lost. A softmax
        does not see it; the logarithm of its sum has to get scale * shift back.
    """

    q: Quantized
    k: Quantized
    mean: Tensor
    balance: Tensor
    shift: Tensor


def smooth_quantize(
    q: Tensor,
    k: Tensor,
    block_q: int,
    block_k: int,
    *,
    real: Tensor | None = None,
    backend: str | None = None,
) -> Smoothed:
    """q and k in INT8, symmetric, one scale per (batch, head, block), K smoothed, both rotated.

    q `[B, H, S, D]` and k `[B, H, keys, D]`, fp16, bf16 or fp32, any strides with unit last one;
    block_q, block_k: tokens that share a scale; real: bool `[B|1, keys]`, which keys count, or
    None for all: what the others hold is neither in the mean nor in a scale, NaN included;
    backend: "triton" or "reference", which runs or raises; default Triton on a GPU.

    scale = amax / 127, values = round(x * (1 / scale)), ties to even. The mean of the real keys,
    per (batch, head, channel), is taken off the keys before ("K smoothing", SageAttention, arXiv
    2410.02367), so that an offset common to all keys costs no bits. We differ: the mean is that of
    `SAMPLED` tokens of each `EVERY` (`reference.sampled`), an eighth of the reading: any vector
    taken off all keys leaves the softmax as it is, and bits are lost only as far as the sample is
    off; the blocks are the mask's, neither 1/sqrt(D) nor log2(e) is folded into the scales of Q,
    and two changes leave the products of q and k as they are. Channels of q are multiplied, and
    those of k divided, by what makes both equally strong, as SmoothQuant (arXiv 2211.10438,
    equation 4) does with activations and weights: the fourth root of the ratio of their mean
    squares over the same tokens, rounded to a power of two from 1/8 to 8, so that no bit is lost;
    we differ in mean squares for largest magnitudes. Keys count without their mean. Then q and k
    are rotated by the same orthogonal matrix (`rotate`), which spreads a channel that is larger
    than all others over many.
    Numbers of real keys must be finite. A number of q that is not finite, or at least 2^124, counts
    as 0, so that a padded query harms no other one of its block.
    Raises ValueError or TypeError for other shapes, dtypes and strides.
    """
    _check(q, "q", block_q)
    _check(k, "k", block_k)
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q and k must agree in B, H and D, got {tuple(q.shape)} and {tuple(k.shape)}."
        )
    real = _checked_real(k, real)
    module = choose(BACKENDS, backend, q, torch.int8)
    mean, balance = module.mean_and_balance(q, k, real)
    queries, shift = module.quantize_queries(q, block_q, mean, balance)
    keys = module.quantize_keys(k, block_k, mean, balance, real)
    return Smoothed(queries, keys, mean, balance, shift)


def rotate(x: Tensor) -> Tensor:
    """x `[..., D]` in fp32 or fp64, each group of `channels_of(D)` channels times one orthogonal
    matrix; shape and dtype of x.

    Entry i, j is +-1 / sqrt(channels), negative where i & j and i & i >> 1 have an odd number of
    bits together: a Hadamard matrix with signs, the "incoherent processing" of FlashAttention-3
    (arXiv 2407.08608, section 3.3). We differ: the groups are smaller than D, and the signs are the
    Rudin-Shapiro sequence instead of random ones, so that not only a single channel but also a
    constant over all channels, or any row of the Hadamard matrix, becomes equally large everywhere.
    """
    channels = channels_of(x.shape[-1])
    if channels == 1:
        return x
    return (x.unflatten(-1, (-1, channels)) @ rotation(channels).to(x)).flatten(-2)


def rotation(channels: int) -> Tensor:
    """The matrix of `rotate`, fp32 `[channels, channels]`, exact in every dtype."""
    i, j = torch.arange(channels)[:, None], torch.arange(channels)
    bits = (i & j) ^ (i & (i >> 1))
    for half in (4, 2, 1):
        bits = bits ^ (bits >> half)
    return (1.0 - 2 * (bits & 1)) / channels**0.5


def channels_of(D: int) -> int:
    """How many neighbouring channels are rotated together: 64 or 16, whose square roots every dtype
    has, or 1 for no rotation where D is no multiple of 16, or above 128 (a tile has no room)."""
    if D > 128 or D % 16:
        return 1
    return 16 if D % 64 else 64


def quantize_values(
    v: Tensor,
    block_k: int,
    *,
    real: Tensor | None = None,
    permuted: bool = False,
    backend: str | None = None,
) -> Quantized:
    """v in fp8 e4m3 (OCP, largest number 448), one scale per (batch, head, channel).

    v `[B, H, keys, D]`; the arguments are those of `smooth_quantize`. Returns values
    `[B, H, D, blocks * block_k]`, channels as rows since 8-bit matrix instructions want the keys
    next to each other, zero in the slots past the end and in masked ones; scale `[B, H, D]`, amax
    over the real keys / 448, as in SageAttention2 (arXiv 2411.10958). Rounds to nearest even.
    permuted: key 8j + 2t + e of each 16 (j, e of 2, t of 4) lies at 4t + 2j + e: the order in which
    a Hopper thread's scores become its part of an 8-bit operand without a shuffle, as in
    SageAttention2.
    """
    _check(v, "v", block_k)
    real = _checked_real(v, real)
    module = choose(BACKENDS, backend, v, torch.float8_e4m3fn)
    return module.quantize_channels(v, block_k, real, permuted)


def _check(x: Tensor, name: str, block: int) -> None:
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(
            f"{name} must be [B, H, tokens, D], not empty; got shape {tuple(x.shape)}."
        )
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be fp16, bf16 or fp32, got {x.dtype}.")
    check_last_stride(**{name: x})
    if block < 16 or block & (block - 1):
        raise ValueError(f"A block must be a power of two of at least 16 tokens, got {block}.")


def _checked_real(x: Tensor, real: Tensor | None) -> Tensor | None:
    if real is None:
        return None
    B, _, keys, _ = x.shape
    if real.dtype != torch.bool or real.shape not in ((B, keys), (1, keys)):
        raise ValueError(
            f"real must be bool [{B}, {keys}] or [1, {keys}], got {real.dtype} {tuple(real.shape)}."
        )
    check_device(real, "real", x, "the keys")
    return real.contiguous()
