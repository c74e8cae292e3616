"""Quantisation on a GPU in passes: means, balance and scales (`moments.py`), queries, keys, values.

A program takes one block of one head; letters: `B H N D` as in the public functions, BD is D
rounded up to a power of two, ROWS the tokens of a block.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdit_sparse.kernels.block_sparse.tiles import architecture
from vdit_sparse.kernels.quant import Quantized, channels_of, rotation
from vdit_sparse.kernels.quant.moments import (
    batch_stride,
    launch_shape,
    load_real,
    mean_and_balance,
    value_scales,
)
from vdit_sparse.kernels.quant.reference import (
    E4M3_LARGEST,
    HUGE,
    INT8_LARGEST,
    SMALLEST_SCALE,
)
from vdit_sparse.kernels.triton_ops import INTERPRETED, has_e4m3, why_not_on

__all__ = [
    "mean_and_balance",
    "quantize_channels",
    "quantize_keys",
    "quantize_queries",
    "supports",
]

VALUE_ROWS = 128  # tokens whose values one program rounds, at most
VALUE_WARPS = 16
# The interpreter cannot multiply bf16.
AS_STORED = tl.constexpr(not INTERPRETED)


@triton.jit
def _matrix(ptr, CHANNELS: tl.constexpr):
    """`quant.rotation`, `[CHANNELS, CHANNELS]`."""
    row, column = tl.arange(0, CHANNELS)[:, None], tl.arange(0, CHANNELS)[None, :]
    return tl.load(ptr + row * CHANNELS + column)


@triton.jit
def _rotated(
    x, balance, matrix, STORED: tl.constexpr, CHANNELS: tl.constexpr,
    BD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`quant.rotate` of an fp32 tile `[ROWS, BD]`, whose numbers are exact in the dtype STORED,
    times the powers of two `balance` `[BD]`."""
    if AS_STORED:
        # Powers of two are exact in every dtype, and so are products with them.
        x = x.to(STORED)
    else:
        matrix = matrix.to(tl.float32)
    x = x * balance.to(x.dtype)[None, :]
    if x.dtype == tl.float16:
        # But for those that leave it.
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0).to(tl.float16)
    x = tl.reshape(x, [ROWS * (BD // CHANNELS), CHANNELS])
    return tl.reshape(tl.dot(x, matrix, input_precision="ieee"), [ROWS, BD])


@triton.jit
def _inverse(powers):
    """1 / powers, of normal powers of two, without a division."""
    return (0x7F000000 - powers.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def rotate_mean(
    mean_ptr, balance_ptr, matrix_ptr, out_ptr,
    CHANNELS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The mean key of one head as `quantize_rows` treats the keys, fp32 `[B * H, D]`."""
    head = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BD)
    mean = tl.load(mean_ptr + head * D + columns, mask=columns < D, other=0.0)
    mean *= _inverse(tl.load(balance_ptr + head * D + columns, mask=columns < D, other=1.0))
    if CHANNELS > 1:
        mean = tl.reshape(mean, [BD // CHANNELS, CHANNELS])
        matrix = _matrix(matrix_ptr, CHANNELS).to(tl.float32)
        mean = tl.sum(mean[:, :, None] * matrix[None, :, :], 1)
        mean = tl.reshape(mean, [BD])
    tl.store(out_ptr + head * D + columns, mean, mask=columns < D)


@triton.jit
def quantize_rows(
    x_ptr, real_ptr, mean_ptr, balance_ptr, matrix_ptr, values_ptr, scale_ptr, shift_ptr,
    x_b, x_h, x_s, real_b, H, N, smallest, huge,
    LARGEST: tl.constexpr, CHANNELS: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """INT8 of one block, balanced and rotated by CHANNELS (`channels_of`). shift_ptr: queries,
    whose product with the mean goes there, or None: keys, from which the mean of `rotate_mean` is
    taken off."""
    columns = tl.arange(0, BD)
    head = tl.program_id(1).to(tl.int64)
    mean = tl.load(mean_ptr + head * D + columns, mask=columns < D, other=0.0)
    balance = tl.load(balance_ptr + head * D + columns, mask=columns < D, other=1.0)
    if CHANNELS > 1:
        # First, so that its way to shared memory runs beside the loads: a tenth of the time.
        matrix = _matrix(matrix_ptr, CHANNELS)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x, real = load_real(rows, x_ptr, real_ptr, x_b, x_h, x_s, real_b, H, N, D, BD)
    if shift_ptr is not None:
        tl.store(shift_ptr + head * N + rows, tl.sum(x * mean[None, :], 1), mask=rows < N)
        x = tl.where(tl.abs(x) < huge, x, 0.0)
    else:
        balance = _inverse(balance)
    if CHANNELS > 1:
        # Keys before the mean is taken off them, after which they are not exact in their dtype.
        x = _rotated(x, balance, matrix, x_ptr.dtype.element_ty, CHANNELS, BD, ROWS)
    else:
        x = x * balance[None, :]
    if shift_ptr is None:
        # Tokens that are not real are zero already.
        x -= mean[None, :] * real.to(tl.float32)[:, None]
    scale = tl.maximum(tl.math.div_rn(tl.max(tl.abs(x)), LARGEST * 1.0), smallest)
    block = head * tl.num_programs(0) + tl.program_id(0)
    tl.store(scale_ptr + block, scale)
    # Adding 1.5 * 2^23 leaves no bits for fractions: the sum is rounded to nearest even, and its
    # last byte is the integer, negative ones too.
    levels = x * tl.math.div_rn(1.0, scale) + 12582912.0
    values = levels.to(tl.int32, bitcast=True).to(tl.int8)
    pointers = values_ptr + (block * ROWS + tl.arange(0, ROWS))[:, None] * D + columns[None, :]
    tl.store(pointers, values, mask=(columns < D)[None, :])


@triton.jit
def quantize_columns(
    x_ptr, real_ptr, inverse_ptr, values_ptr, x_b, x_h, x_s, real_b, H, N,
    LARGEST: tl.constexpr, PERMUTED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """fp8 e4m3 of ROWS tokens times the reciprocals of the scales, stored with channels as rows;
    PERMUTED: see `quantize_values`."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x, _ = load_real(rows, x_ptr, real_ptr, x_b, x_h, x_s, real_b, H, N, D, BD)
    columns = tl.arange(0, BD)
    head = tl.program_id(1).to(tl.int64)
    levels = x * tl.load(inverse_ptr + head * D + columns, mask=columns < D, other=1.0)[None, :]
    levels = tl.minimum(tl.maximum(levels, -LARGEST * 1.0), LARGEST * 1.0)
    values = tl.trans(levels.to(tl.float8e4nv))
    if PERMUTED:
        # Moved here and not by the pointers, so that a thread stores neighbours together.
        values = tl.reshape(values, [BD, ROWS // 16, 2, 4, 2])
        values = tl.reshape(tl.permute(values, [0, 1, 3, 2, 4]), [BD, ROWS])
    channels = (head * D + columns) * (tl.num_programs(0) * ROWS)
    pointers = values_ptr + channels[:, None] + rows.to(tl.int64)[None, :]
    tl.store(pointers, values, mask=(columns < D)[:, None])


def supports(x: Tensor, kind: torch.dtype) -> str | None:
    """None if this backend makes numbers of `kind` of x, else the reason why it does not."""
    arch = architecture(x.device)
    if kind == torch.float8_e4m3fn and x.device.type == "cuda" and not has_e4m3(arch):
        return f"e4m3 needs NVIDIA compute capability 8.9, this is {arch}"
    return why_not_on(x.device)


def quantize_queries(
    q: Tensor, block: int, mean: Tensor, balance: Tensor
) -> tuple[Quantized, Tensor]:
    """INT8 queries times balance, and q . mean, see `smooth_quantize`."""
    shift = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return _rows(q, block, mean, balance, None, shift), shift


def quantize_keys(
    k: Tensor, block: int, mean: Tensor, balance: Tensor, real: Tensor | None
) -> Quantized:
    """INT8 keys less their mean, divided by balance, see `smooth_quantize`."""
    B, H, _, D = k.shape
    mean = mean.contiguous()
    rotated = torch.empty_like(mean)
    with torch.cuda.device_of(k):
        rotate_mean[(B * H,)](
            mean, balance.contiguous(), _rotation(k), rotated,
            CHANNELS=channels_of(D), D=D, BD=triton.next_power_of_2(D),
        )  # fmt: skip
    return _rows(k, block, rotated, balance, real, None)


def quantize_channels(
    v: Tensor, block: int, real: Tensor | None, permuted: bool = False
) -> Quantized:
    """See `quantize_values`."""
    B, H, N, D = v.shape
    scale, inverse = value_scales(v, real)
    slots, rows = triton.cdiv(N, block) * block, min(VALUE_ROWS, block)
    values = torch.empty(B, H, D, slots, dtype=torch.float8_e4m3fn, device=v.device)
    with torch.cuda.device_of(v):
        quantize_columns[(slots // rows, B * H)](
            v, real, inverse, values, *v.stride()[:3], batch_stride(real), H, N,
            LARGEST=E4M3_LARGEST, PERMUTED=permuted, **launch_shape(D, rows, VALUE_WARPS),
        )  # fmt: skip
    return Quantized(values, scale)


def _rows(
    x: Tensor,
    block: int,
    mean: Tensor,
    balance: Tensor,
    real: Tensor | None,
    shift: Tensor | None,
) -> Quantized:
    B, H, N, D = x.shape
    blocks = triton.cdiv(N, block)
    values = torch.empty(B, H, blocks * block, D, dtype=torch.int8, device=x.device)
    scale = torch.empty(B, H, blocks, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        quantize_rows[(blocks, B * H)](
            x, real, mean.contiguous(), balance.contiguous(), _rotation(x), values, scale, shift,
            *x.stride()[:3], batch_stride(real), H, N, SMALLEST_SCALE, HUGE,
            LARGEST=INT8_LARGEST, CHANNELS=channels_of(D), **launch_shape(D, block),
            **limit_of(architecture(x.device), D),
        )  # fmt: skip
    return Quantized(values, scale)


def _rotation(x: Tensor) -> Tensor | None:
    channels = channels_of(x.shape[-1])
    return None if channels == 1 else _rotation_on(channels, x.dtype, x.device)


@cache
def _rotation_on(channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return rotation(channels).to(device, dtype)


def limit_of(arch: str, D: int) -> dict[str, int]:
    """An option of `quantize_rows` on Hopper: so few registers, without spilling one, that two
    programs fit a multiprocessor."""
    return {"maxnreg": 128} if arch == "sm_90" and D <= 128 else {}
