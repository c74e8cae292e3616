"""Quantisation on a GPU in three passes: sums over channels, queries and keys, values.

One program takes one block of one head; letters: `B H N D` as in the public functions, BD is D
rounded up to a power of two, ROWS the tokens of a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdit_sparse.kernels.block_sparse.tiles import architecture
from vdit_sparse.kernels.quant import Quantized
from vdit_sparse.kernels.quant.reference import (
    E4M3_LARGEST,
    INT8_LARGEST,
    SMALLEST_SCALE,
    scale_of,
)
from vdit_sparse.kernels.triton_ops import INTERPRETED, has_e4m3, why_not_on

STATISTICS_ROWS = 128  # tokens that one program sums up
VALUE_ROWS = 128  # tokens whose values one program rounds, at most
WARPS = 8
# The interpreter cannot multiply bf16.
AS_STORED = tl.constexpr(not INTERPRETED)


@triton.jit
def _rotated(x, mean, STORED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr):
    """`quant.rotate` of an fp32 tile `[ROWS, BD]` whose numbers are exact in the dtype STORED, and
    of the fp32 mean `[BD]`."""
    CHANNELS: tl.constexpr = 64 if D % 64 == 0 else 16
    GROUPS: tl.constexpr = BD // CHANNELS
    ROOT: tl.constexpr = 0.125 if CHANNELS == 64 else 0.25
    row, column = tl.arange(0, CHANNELS)[:, None], tl.arange(0, CHANNELS)[None, :]
    parity = (row & column) ^ (row & (row >> 1))
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    matrix = tl.where((parity & 1) == 1, -ROOT, ROOT)
    mean = tl.sum(tl.reshape(mean, [GROUPS, CHANNELS])[:, :, None] * matrix[None, :, :], 1)
    x = tl.reshape(x, [ROWS * GROUPS, CHANNELS])
    if AS_STORED:
        # Powers of two are exact in every dtype.
        x, matrix = x.to(STORED), matrix.to(STORED)
    x = tl.dot(x, matrix, input_precision="ieee")
    return tl.reshape(x, [ROWS, BD]), tl.reshape(mean, [BD])


@triton.jit
def _load_real(
    x_ptr, real_ptr, x_b, x_h, x_s, real_b, H, N,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """fp32 tile of this program's block, zero where no real token is, and which rows are real."""
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BD)
    real = rows < N
    if real_ptr is not None:
        real = real & (tl.load(real_ptr + b * real_b + rows, mask=real, other=0) != 0)
    pointers = x_ptr + b * x_b + h * x_h + rows.to(tl.int64)[:, None] * x_s + columns[None, :]
    tile = tl.load(pointers, mask=real[:, None] & (columns < D)[None, :], other=0.0)
    return tile.to(tl.float32), real


@triton.jit
def channel_statistics(
    x_ptr, real_ptr, out_ptr, x_b, x_h, x_s, real_b, H, N,
    LARGEST: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Each block's sum over tokens, or its largest magnitude, fp32 `[B * H, blocks, D]`."""
    x, _ = _load_real(x_ptr, real_ptr, x_b, x_h, x_s, real_b, H, N, D, BD, ROWS)
    result = tl.max(tl.abs(x), 0) if LARGEST else tl.sum(x, 0)
    block = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    columns = tl.arange(0, BD)
    tl.store(out_ptr + block * D + columns, result, mask=columns < D)


@triton.jit
def quantize_rows(
    x_ptr, real_ptr, mean_ptr, values_ptr, scale_ptr, shift_ptr,
    x_b, x_h, x_s, real_b, H, N, smallest,
    LARGEST: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """INT8 of one block, rotated. shift_ptr: queries, whose product with the mean goes there, or
    None: keys, from which the mean, rotated, is taken off."""
    x, real = _load_real(x_ptr, real_ptr, x_b, x_h, x_s, real_b, H, N, D, BD, ROWS)
    columns = tl.arange(0, BD)
    head = tl.program_id(1).to(tl.int64)
    mean = tl.load(mean_ptr + head * D + columns, mask=columns < D, other=0.0)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if shift_ptr is not None:
        tl.store(shift_ptr + head * N + rows, tl.sum(x * mean[None, :], 1), mask=rows < N)
        x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
    if D % 16 == 0 and D <= 128:
        # Keys before the mean is taken off them, after which they are not exact in their dtype.
        x, mean = _rotated(x, mean, x_ptr.dtype.element_ty, D, BD, ROWS)
    if shift_ptr is None:
        x = tl.where(real[:, None], x - mean[None, :], 0.0)
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
    x, _ = _load_real(x_ptr, real_ptr, x_b, x_h, x_s, real_b, H, N, D, BD, ROWS)
    columns = tl.arange(0, BD)
    head = tl.program_id(1).to(tl.int64)
    levels = x * tl.load(inverse_ptr + head * D + columns, mask=columns < D, other=1.0)[None, :]
    levels = tl.minimum(tl.maximum(levels, -LARGEST * 1.0), LARGEST * 1.0)
    values = tl.trans(levels.to(tl.float8e4nv))
    if PERMUTED:
        # Moved here and not by the pointers, so that a thread stores neighbours together.
        values = tl.reshape(values, [BD, ROWS // 16, 2, 4, 2])
        values = tl.reshape(tl.permute(values, [0, 1, 3, 2, 4]), [BD, ROWS])
    slots = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    channels = (head * D + columns) * (tl.num_programs(0) * ROWS)
    pointers = values_ptr + channels[:, None] + slots[None, :]
    tl.store(pointers, values, mask=(columns < D)[:, None])


def supports(x: Tensor, kind: torch.dtype) -> str | None:
    """None if this backend makes numbers of `kind` of x, else the reason why it does not."""
    arch = architecture(x.device)
    if kind == torch.float8_e4m3fn and x.device.type == "cuda" and not has_e4m3(arch):
        return f"e4m3 needs NVIDIA compute capability 8.9, this is {arch}"
    return why_not_on(x.device)


def mean_key(k: Tensor, real: Tensor | None) -> Tensor:
    """Mean over the real keys, fp32 `[B, H, D]`; 0 without any."""
    sums = _statistics(k, real, largest=False).sum(2)
    if real is None:
        return sums / k.shape[2]
    return sums / real.sum(1).clamp(min=1)[:, None, None]


def quantize_queries(q: Tensor, block: int, mean: Tensor) -> tuple[Quantized, Tensor]:
    """INT8 queries and q . mean, see `smooth_quantize`."""
    shift = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return _rows(q, block, mean, None, shift), shift


def quantize_keys(k: Tensor, block: int, mean: Tensor, real: Tensor | None) -> Quantized:
    """INT8 keys less their mean, see `smooth_quantize`."""
    return _rows(k, block, mean, real, None)


def quantize_channels(
    v: Tensor, block: int, real: Tensor | None, permuted: bool = False
) -> Quantized:
    """See `quantize_values`."""
    B, H, N, D = v.shape
    scale = scale_of(_statistics(v, real, largest=True).amax(2), E4M3_LARGEST)
    slots, rows = triton.cdiv(N, block) * block, min(VALUE_ROWS, block)
    values = torch.empty(B, H, D, slots, dtype=torch.float8_e4m3fn, device=v.device)
    with torch.cuda.device_of(v):
        quantize_columns[(slots // rows, B * H)](
            v, real, scale.reciprocal(), values, *v.stride()[:3], _batch_stride(real), H, N,
            LARGEST=E4M3_LARGEST, PERMUTED=permuted, **_shape(D, rows),
        )  # fmt: skip
    return Quantized(values, scale)


def _rows(
    x: Tensor, block: int, mean: Tensor, real: Tensor | None, shift: Tensor | None
) -> Quantized:
    B, H, N, D = x.shape
    blocks = triton.cdiv(N, block)
    values = torch.empty(B, H, blocks * block, D, dtype=torch.int8, device=x.device)
    scale = torch.empty(B, H, blocks, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        quantize_rows[(blocks, B * H)](
            x, real, mean.contiguous(), values, scale, shift,
            *x.stride()[:3], _batch_stride(real), H, N, SMALLEST_SCALE,
            LARGEST=INT8_LARGEST, **_shape(D, block), **limit_of(architecture(x.device), D),
        )  # fmt: skip
    return Quantized(values, scale)


def limit_of(arch: str, D: int) -> dict[str, int]:
    """An option of `quantize_rows` on Hopper: so few registers, without spilling one, that two
    programs fit a multiprocessor."""
    return {"maxnreg": 128} if arch == "sm_90" and D <= 128 else {}


def _statistics(x: Tensor, real: Tensor | None, largest: bool) -> Tensor:
    """Sums or largest magnitudes of parts of the sequence, fp32 `[B, H, parts, D]`."""
    B, H, N, D = x.shape
    parts = triton.cdiv(N, STATISTICS_ROWS)
    out = torch.empty(B, H, parts, D, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        channel_statistics[(parts, B * H)](
            x, real, out, *x.stride()[:3], _batch_stride(real), H, N,
            LARGEST=largest, **_shape(D, STATISTICS_ROWS),
        )  # fmt: skip
    return out


def _shape(D: int, rows: int) -> dict[str, int]:
    return {"D": D, "BD": triton.next_power_of_2(D), "ROWS": rows, "num_warps": WARPS}


def _batch_stride(real: Tensor | None) -> int:
    """Stride of the batch, 0 where one row is shared."""
    return 0 if real is None or real.shape[0] == 1 else real.stride(0)
