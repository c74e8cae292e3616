"""Quantisation of q, k and v to 8 bits, for kernels that multiply such numbers.

    pair = smooth_quantize(q, k, 128, 128)
    values = quantize_values(v, 128)

`reference.py` is the specification in plain torch, `triton.py` the path of GPUs. This room only
quantises; `kernels.block_sparse` multiplies.
"""

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["BACKENDS", "Quantized", "Smoothed", "quantize_values", "smooth_quantize"]

# In the order of preference when none is asked for.
BACKENDS = {
    "triton": "vdit_sparse.kernels.quant.triton",
    "reference": "vdit_sparse.kernels.quant.reference",
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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
    """Queries and keys of an attention call, quantised after the mean key was taken off the keys.

    q, k: `Quantized`, int8 `[B, H, blocks * block, D]` with a scale per block, zero in the slots
        past the end and in masked ones.
    mean: fp32 `[B, H, D]`, the mean key.
    shift: fp32 `[B, H, S]`, q . mean, what each query's products with all keys have lost. A softmax
        does not see it; the logarithm of its sum has to get scale * shift back.
    """

    q: Quantized
    k: Quantized
    mean: Tensor
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
    """q and k in INT8, symmetric, one scale per (batch, head, block), K smoothed.

    q `[B, H, S, D]` and k `[B, H, keys, D]`, fp16, bf16 or fp32, any strides with unit last one;
    block_q, block_k: tokens that share a scale; real: bool `[B|1, keys]`, which keys count, or
    None for all: what the others hold is neither in the mean nor in a scale, NaN included;
    backend: "triton" or "reference", which runs or raises; default Triton on a GPU.

    scale = amax / 127, values = round(x / scale), ties to even. The mean over the real keys, per
    (batch, head, channel), is taken off the keys before ("K smoothing", SageAttention, arXiv
    2410.02367), so that an offset common to all keys costs no bits. We differ: the blocks are the
    mask's, and neither 1/sqrt(D) nor log2(e) is folded into the scales of Q.
    Numbers of real keys must be finite. A number of q that is not finite counts as 0, so that a
    padded query harms no other one of its block.
    Raises ValueError or TypeError for other shapes, dtypes and strides.
    """
    _check(q, "q", block_q, backend)
    _check(k, "k", block_k, backend)
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q and k must agree in B, H and D, got {tuple(q.shape)} and {tuple(k.shape)}."
        )
    real = _checked_real(k, real)
    module = _load(backend or _default(q))
    mean = module.mean_key(k, real)
    queries, shift = module.quantize_queries(q, block_q, mean)
    return Smoothed(queries, module.quantize_keys(k, block_k, mean, real), mean, shift)


def quantize_values(
    v: Tensor, block_k: int, *, real: Tensor | None = None, backend: str | None = None
) -> Quantized:
    """v in fp8 e4m3 (OCP, largest number 448), one scale per (batch, head, channel).

    v `[B, H, keys, D]`; the arguments are those of `smooth_quantize`. Returns values
    `[B, H, D, blocks * block_k]`, channels as rows since 8-bit matrix instructions want the keys
    next to each other, zero in the slots past the end and in masked ones; scale `[B, H, D]`, amax
    over the real keys / 448, as in SageAttention2 (arXiv 2411.10958). Rounds to nearest even.
    """
    _check(v, "v", block_k, backend)
    real = _checked_real(v, real)
    return _load(backend or _default(v, e4m3=True)).quantize_channels(v, block_k, real)


def _default(x: Tensor, e4m3: bool = False) -> str:
    """Triton on GPUs; those before compute capability 8.9 and AMD's have no such e4m3 in Triton."""
    if x.device.type != "cuda":
        return "reference"
    if e4m3 and (torch.version.hip or torch.cuda.get_device_capability(x.device) < (8, 9)):
        return "reference"
    return "triton"


def _load(name: str) -> ModuleType:
    return import_module(BACKENDS[name])


def _check(x: Tensor, name: str, block: int, backend: str | None) -> None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {tuple(BACKENDS)} or None, got {backend!r}.")
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(
            f"{name} must be [B, H, tokens, D], not empty; got shape {tuple(x.shape)}."
        )
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be fp16, bf16 or fp32, got {x.dtype}.")
    if x.stride(-1) != 1:
        raise ValueError(
            f"{name} must have unit stride in its last dimension, got strides {x.stride()}; "
            f"pass {name}.contiguous()."
        )
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
    if real.device != x.device:
        raise ValueError(f"real must be on {x.device} like the keys, got {real.device}.")
    return real.contiguous()
