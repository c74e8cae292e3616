"""What several Triton kernels and their launches share."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vdit_sparse.kernels.block_sparse.layout import head_strides
from vdit_sparse.kernels.block_sparse.tiles import architecture

LOG2_E = 1.4426950408889634
LARGEST_D = 256
SMALLEST_WIDTH = 16  # matrix instructions take 16 numbers of two bytes along the summed dimension


@triton.jit
def load_rows(base, start, stride, rows, end, columns, D: tl.constexpr, BD: tl.constexpr):
    """Rows `start + rows` of a matrix, zero from row `end` on."""
    pointers = base + start.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    real = (start + rows < end)[:, None]
    if BD != D:
        real = real & (columns < D)[None, :]
    return tl.load(pointers, mask=real, other=0.0)


@triton.jit
def load_whole(base, start, stride, rows, columns, D: tl.constexpr, BD: tl.constexpr):
    """Rows `start + rows` of a matrix that has them all."""
    pointers = base + start.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    if BD == D:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    return tile


@triton.jit
def online_softmax(scores, acc, peak, total, scale_log2, GUARD: tl.constexpr):
    """Weights of this tile, rescaled accumulator, running maximum (log2 units) and sum."""
    peak_new = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
    shift = peak_new
    if GUARD:
        # A row that has seen only masked keys has peak = -inf, and -inf - -inf is nan.
        shift = tl.where(peak_new == float("-inf"), 0.0, peak_new)
    p = tl.exp2(scores * scale_log2 - shift[:, None])
    alpha = tl.exp2(peak - shift)
    return p, acc * alpha[:, None], peak_new, total * alpha + tl.sum(p, 1)


@triton.jit
def split_list(list_ptr, n, full, whole, CHUNK: tl.constexpr):
    """How many of the `n` ascending entries are below `whole`, and the entry after them or -1."""
    below = tl.minimum(n, whole)
    following = tl.where(below < n, whole, -1)
    if not full:
        below = 0
        for first in tl.range(0, n, CHUNK, num_stages=1):
            at = first + tl.arange(0, CHUNK)
            entries = tl.load(list_ptr + at, mask=at < n, other=2147483647)
            below += tl.sum((entries < whole).to(tl.int32), 0)
        following = tl.load(list_ptr + below, mask=below < n, other=-1)
    return below, following


# Decided when the kernels above were decorated: a JITFunction compiles, the other one interprets.
INTERPRETED = not isinstance(load_rows, triton.runtime.JITFunction)


def why_not_on(device: torch.device) -> str | None:
    """Why no Triton kernel runs on `device`, None if they do."""
    if device.type != "cuda" and not INTERPRETED:
        return f"it needs a CUDA or ROCm GPU, the tensors are on {device.type}"
    if device.type not in ("cpu", "cuda"):
        return f"Triton's interpreter runs on the CPU, the tensors are on {device.type}"
    return None


def why_no_products(q: Tensor) -> str | None:
    """Why a kernel that multiplies rows of `q` `[B, H, S, D]` cannot run on its device, dtype or D,
    None if it can."""
    reason = why_not_on(q.device)
    if reason is not None:
        return reason
    if INTERPRETED and q.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies the bits of bfloat16 numbers, not the numbers"
    if q.shape[-1] > LARGEST_D:
        return f"D is at most {LARGEST_D}, got {q.shape[-1]}"
    arch = architecture(q.device)
    if arch.startswith("sm_") and int(arch[3:]) < 80:
        return f"it needs compute capability 8.0, this GPU has {arch[3:-1]}.{arch[-1]}"
    return None


def has_e4m3(arch: str) -> bool:
    """Whether Triton has e4m3 numbers on this GPU: NVIDIA's, from compute capability 8.9 on."""
    return arch.startswith("sm_") and int(arch[3:]) >= 89


def width_of(D: int, smallest: int = SMALLEST_WIDTH) -> int:
    """D rounded up to what a kernel multiplies."""
    return max(smallest, triton.next_power_of_2(D))


def shared_strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of the first three dimensions of a mask tensor, 0 where a size of 1 is shared."""
    return tuple(s if n > 1 else 0 for s, n in zip(x.stride()[:3], x.shape, strict=False))


def descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor of x `[B, H, ., .]` that reads tiles of `rows` x `columns`."""
    return TensorDescriptor(x, list(x.shape), [*head_strides(x), 1], [1, 1, rows, columns])
