"""Quantisation on a GPU in passes: sums over channels, their balance, queries and keys, values.

One program takes one block of one head; letters: `B H N D` as in the public functions, BD is D
rounded up to a power of two, ROWS the tokens of a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdit_sparse.kernels.block_sparse.tiles import architecture
from vdit_sparse.kernels.quant import EVERY, LARGEST_BALANCE, SAMPLED, Quantized, channels_of
from vdit_sparse.kernels.quant.reference import (
    E4M3_LARGEST,
    HUGE,
    INT8_LARGEST,
    SMALLEST_SCALE,
    sampled,
    scale_of,
)
from vdit_sparse.kernels.triton_ops import INTERPRETED, has_e4m3, why_not_on

STATISTICS_ROWS = 128  # tokens that one program sums up
VALUE_ROWS = 128  # tokens whose values one program rounds, at most
WARPS = 8
# The interpreter cannot multiply bf16.
AS_STORED = tl.constexpr(not INTERPRETED)


@triton.jit
def _matrix(CHANNELS: tl.constexpr):
    """The matrix of `quant.rotate`, fp32 `[CHANNELS, CHANNELS]`."""
    ROOT: tl.constexpr = 0.125 if CHANNELS == 64 else 0.25
    row, column = tl.arange(0, CHANNELS)[:, None], tl.arange(0, CHANNELS)[None, :]
    parity = (row & column) ^ (row & (row >> 1))
    parity ^= parity >> 4
    parity ^= parity >> 2
    parity ^= parity >> 1
    return tl.where((parity & 1) == 1, -ROOT, ROOT)


@triton.jit
def _rotated(
    x, balance, STORED: tl.constexpr, CHANNELS: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr
):
    """`quant.rotate` of an fp32 tile `[ROWS, BD]`, whose numbers are exact in the dtype STORED,
    times the powers of two `balance` `[BD]`."""
    matrix = _matrix(CHANNELS)
    if AS_STORED:
        # Powers of two are exact in every dtype, and so are products with them.
        x, matrix = x.to(STORED), matrix.to(STORED)
    x = x * balance.to(x.dtype)[None, :]
    if x.dtype == tl.float16:
        # But for those that leave it.
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0).to(tl.float16)
    x = tl.reshape(x, [ROWS * (BD // CHANNELS), CHANNELS])
    return tl.reshape(tl.dot(x, matrix, input_precision="ieee"), [ROWS, BD])


@triton.jit
def _load_real(
    first, x_ptr, real_ptr, x_b, x_h, x_s, real_b, H, N,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """fp32 tile of ROWS tokens, zero where no real token is, and which rows are real."""
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    rows = first + tl.arange(0, ROWS)
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
    first = tl.program_id(0) * ROWS
    x, _ = _load_real(first, x_ptr, real_ptr, x_b, x_h, x_s, real_b, H, N, D, BD, ROWS)
    result = tl.max(tl.abs(x), 0) if LARGEST else tl.sum(x, 0)
    block = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    columns = tl.arange(0, BD)
    tl.store(out_ptr + block * D + columns, result, mask=columns < D)


@triton.jit
def sampled_squares(
    x_ptr, real_ptr, mean_ptr, out_ptr, x_b, x_h, x_s, real_b, H, N, every, huge,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sums of squares over the first ROWS of each `every` tokens, fp32 `[B * H, parts, D]`.
    mean_ptr: of keys, taken off them, or None: queries."""
    first = tl.program_id(0) * every
    x, real = _load_real(first, x_ptr, real_ptr, x_b, x_h, x_s, real_b, H, N, D, BD, ROWS)
    columns = tl.arange(0, BD)
    head = tl.program_id(1).to(tl.int64)
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + head * D + columns, mask=columns < D, other=0.0)
        x = tl.where(real[:, None], x - mean[None, :], 0.0)
    else:
        x = tl.where(tl.abs(x) < huge, x, 0.0)
    part = head * tl.num_programs(0) + tl.program_id(0)
    tl.store(out_ptr + part * D + columns, tl.sum(x * x, 0), mask=columns < D)


@triton.jit
def _sum_of_parts(ptr, parts, D: tl.constexpr, BD: tl.constexpr):
    """Sum of `[parts, D]`, many of them at a time."""
    AT_ONCE: tl.constexpr = 32
    found = tl.zeros([AT_ONCE, BD], tl.float32)
    columns = tl.arange(0, BD)
    for start in range(0, parts, AT_ONCE):
        rows = start + tl.arange(0, AT_ONCE)
        real = (rows < parts)[:, None] & (columns < D)[None, :]
        found += tl.load(ptr + rows[:, None] * D + columns[None, :], mask=real, other=0.0)
    return tl.sum(found, 0)


@triton.jit
def balance_channels(
    q_ptr, k_ptr, count_ptr, out_ptr, H, q_parts, k_parts, q_count, k_count,
    LARGEST: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """`reference.balance_of` of one head, from its `sampled_squares`. count_ptr: fp32 `[B]`, how
    many keys there are in those, or None: k_count in all."""
    head = tl.program_id(0).to(tl.int64)
    of_q = _sum_of_parts(q_ptr + head * q_parts * D, q_parts, D, BD)
    of_k = _sum_of_parts(k_ptr + head * k_parts * D, k_parts, D, BD)
    if count_ptr is not None:
        k_count = tl.load(count_ptr + tl.program_id(0) // H)
    exponent = tl.floor(0.25 * tl.log2(of_k / k_count / (of_q / q_count)) + 0.5)
    exponent = tl.where(tl.abs(exponent) < float("inf"), exponent, 0.0)
    exponent = tl.minimum(tl.maximum(exponent, -LARGEST * 1.0), LARGEST * 1.0)
    columns = tl.arange(0, BD)
    tl.store(out_ptr + head * D + columns, tl.exp2(exponent), mask=columns < D)


@triton.jit
def _inverse(powers):
    """1 / powers, of normal powers of two, without a division."""
    return (0x7F000000 - powers.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def rotate_mean(
    mean_ptr, balance_ptr, out_ptr, CHANNELS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr
):
    """The mean key of one head as `quantize_rows` treats the keys, fp32 `[B * H, D]`."""
    head = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BD)
    mean = tl.load(mean_ptr + head * D + columns, mask=columns < D, other=0.0)
    mean *= _inverse(tl.load(balance_ptr + head * D + columns, mask=columns < D, other=1.0))
    if CHANNELS > 1:
        mean = tl.reshape(mean, [BD // CHANNELS, CHANNELS])
        mean = tl.sum(mean[:, :, None] * _matrix(CHANNELS)[None, :, :], 1)
        mean = tl.reshape(mean, [BD])
    tl.store(out_ptr + head * D + columns, mean, mask=columns < D)


@triton.jit
def quantize_rows(
    x_ptr, real_ptr, mean_ptr, balance_ptr, values_ptr, scale_ptr, shift_ptr,
    x_b, x_h, x_s, real_b, H, N, smallest, huge,
    LARGEST: tl.constexpr, CHANNELS: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """INT8 of one block, balanced and rotated by CHANNELS (`channels_of`). shift_ptr: queries,
    whose product with the mean goes there, or None: keys, from which the mean of `rotate_mean` is
    taken off."""
    first = tl.program_id(0) * ROWS
    x, real = _load_real(first, x_ptr, real_ptr, x_b, x_h, x_s, real_b, H, N, D, BD, ROWS)
    columns = tl.arange(0, BD)
    head = tl.program_id(1).to(tl.int64)
    mean = tl.load(mean_ptr + head * D + columns, mask=columns < D, other=0.0)
    balance = tl.load(balance_ptr + head * D + columns, mask=columns < D, other=1.0)
    rows = first + tl.arange(0, ROWS)
    if shift_ptr is not None:
        tl.store(shift_ptr + head * N + rows, tl.sum(x * mean[None, :], 1), mask=rows < N)
        x = tl.where(tl.abs(x) < huge, x, 0.0)
    else:
        balance = _inverse(balance)
    if CHANNELS > 1:
        # Keys before the mean is taken off them, after which they are not exact in their dtype.
        x = _rotated(x, balance, x_ptr.dtype.element_ty, CHANNELS, BD, ROWS)
    else:
        x = x * balance[None, :]
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
    first = tl.program_id(0) * ROWS
    x, _ = _load_real(first, x_ptr, real_ptr, x_b, x_h, x_s, real_b, H, N, D, BD, ROWS)
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


def balance_of(q: Tensor, k: Tensor, mean: Tensor, real: Tensor | None) -> Tensor:
    """See `reference.balance_of`."""
    B, H, N, D = k.shape
    mean = mean.contiguous()
    of_q, of_k = _squares(q, None, None), _squares(k, real, mean)
    count = None
    if real is not None:
        # Not by indexing, for which a GPU would have to be waited for.
        among = real & sampled(N, k.device)
        count = among.sum(1, dtype=torch.float32).expand(B).contiguous()
    out = torch.empty_like(mean)
    with torch.cuda.device_of(q):
        balance_channels[(B * H,)](
            of_q, of_k, count, out, H, of_q.shape[2], of_k.shape[2],
            _sampled(q.shape[2]), _sampled(N), LARGEST=LARGEST_BALANCE, D=D,
            BD=triton.next_power_of_2(D),
        )  # fmt: skip
    return out


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
    mean, rotated = mean.contiguous(), torch.empty_like(mean, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(k):
        rotate_mean[(B * H,)](
            mean, balance.contiguous(), rotated,
            CHANNELS=channels_of(D), D=D, BD=triton.next_power_of_2(D),
        )  # fmt: skip
    return _rows(k, block, rotated, balance, real, None)


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
            x, real, mean.contiguous(), balance.contiguous(), values, scale, shift,
            *x.stride()[:3], _batch_stride(real), H, N, SMALLEST_SCALE, HUGE,
            LARGEST=INT8_LARGEST, CHANNELS=channels_of(D), **_shape(D, block),
            **limit_of(architecture(x.device), D),
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


def _squares(x: Tensor, real: Tensor | None, mean: Tensor | None) -> Tensor:
    """Sums of squares of samples of the sequence, fp32 `[B, H, parts, D]`."""
    B, H, N, D = x.shape
    parts = triton.cdiv(N, EVERY)
    out = torch.empty(B, H, parts, D, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        sampled_squares[(parts, B * H)](
            x, real, mean, out, *x.stride()[:3], _batch_stride(real), H, N, EVERY, HUGE,
            **_shape(D, SAMPLED),
        )  # fmt: skip
    return out


def _sampled(tokens: int) -> float:
    """How many of so many tokens are in the samples."""
    return float(tokens // EVERY * SAMPLED + min(tokens % EVERY, SAMPLED))


def _shape(D: int, rows: int) -> dict[str, int]:
    return {"D": D, "BD": triton.next_power_of_2(D), "ROWS": rows, "num_warps": WARPS}


def _batch_stride(real: Tensor | None) -> int:
    """Stride of the batch, 0 where one row is shared."""
    return 0 if real is None or real.shape[0] == 1 else real.stride(0)
