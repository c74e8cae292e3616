"""Over tokens on a GPU: the mean key and the balance of channels, and the scales of values.

A program takes tokens of one head; letters: `B H N D` as in the public functions, BD is D rounded
up to a power of two, ROWS the tokens of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdit_sparse.kernels.quant import EVERY, LARGEST_BALANCE, SAMPLED
from vdit_sparse.kernels.quant.reference import E4M3_LARGEST, HUGE, SMALLEST_SCALE, sampled, samples

# Tokens of a tile, and tiles, that one program takes: sampled ones, and values.
MOMENT_ROWS, MOMENT_TILES = 32, 8
LARGEST_ROWS, LARGEST_TILES = 64, 8
WARPS = 8


@triton.jit
def load_real(
    rows, x_ptr, real_ptr, x_b, x_h, x_s, real_b, H, N, D: tl.constexpr, BD: tl.constexpr
):
    """fp32 tile of these tokens, zero where no real token is, and which of them are real."""
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    columns = tl.arange(0, BD)
    real = rows < N
    if real_ptr is not None:
        real = real & (tl.load(real_ptr + b * real_b + rows, mask=real, other=0) != 0)
    pointers = x_ptr + b * x_b + h * x_h + rows.to(tl.int64)[:, None] * x_s + columns[None, :]
    tile = tl.load(pointers, mask=real[:, None] & (columns < D)[None, :], other=0.0)
    return tile.to(tl.float32), real


@triton.jit
def largest_magnitudes(
    x_ptr, real_ptr, out_ptr, x_b, x_h, x_s, real_b, H, N,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Of each channel in ROWS * TILES tokens, fp32 `[B * H, parts, D]`."""
    largest = tl.zeros([ROWS, BD], tl.float32)
    # Unrolled: all tiles are on their way at once.
    for i in tl.static_range(TILES):
        rows = (tl.program_id(0) * TILES + i) * ROWS + tl.arange(0, ROWS)
        x, _ = load_real(rows, x_ptr, real_ptr, x_b, x_h, x_s, real_b, H, N, D, BD)
        largest = tl.maximum(largest, tl.abs(x))
    part = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    columns = tl.arange(0, BD)
    tl.store(out_ptr + part * D + columns, tl.max(largest, 0), mask=columns < D)


@triton.jit
def join_largest(
    parts_ptr, scale_ptr, inverse_ptr, parts, smallest,
    LARGEST: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The scales of one head's channels (`reference.scale_of`) and their reciprocals, from its
    `largest_magnitudes`."""
    AT_ONCE: tl.constexpr = 32
    head = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BD)
    found = tl.zeros([AT_ONCE, BD], tl.float32)
    for start in range(0, parts, AT_ONCE):
        part = start + tl.arange(0, AT_ONCE)[:, None]
        real = (part < parts) & (columns < D)[None, :]
        pointers = parts_ptr + (head * parts + part) * D + columns[None, :]
        found = tl.maximum(found, tl.load(pointers, mask=real, other=0.0))
    scale = tl.maximum(tl.math.div_rn(tl.max(found, 0), LARGEST * 1.0), smallest)
    tl.store(scale_ptr + head * D + columns, scale, mask=columns < D)
    tl.store(inverse_ptr + head * D + columns, tl.math.div_rn(1.0, scale), mask=columns < D)


@triton.jit
def sampled_moments(
    x_ptr, real_ptr, out_ptr, x_b, x_h, x_s, real_b, H, N, huge,
    QUERIES: tl.constexpr, SAMPLED: tl.constexpr, EVERY: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Sums of ROWS * TILES sampled tokens (`reference.sampled`) and of their squares, fp32
    `[B * H, parts, 2, D]`."""
    columns = tl.arange(0, BD)
    total = tl.zeros([ROWS, BD], tl.float32)
    squares = tl.zeros([ROWS, BD], tl.float32)
    for tile in tl.static_range(TILES):
        i = (tl.program_id(0) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        group = i // SAMPLED
        rows = group * EVERY + group % (EVERY // SAMPLED) * SAMPLED + i % SAMPLED
        x, _ = load_real(rows, x_ptr, real_ptr, x_b, x_h, x_s, real_b, H, N, D, BD)
        if QUERIES:
            x = tl.where(tl.abs(x) < huge, x, 0.0)
        total += x
        squares += x * x
    part = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    out_ptr += part * 2 * D + columns
    tl.store(out_ptr, tl.sum(total, 0), mask=columns < D)
    tl.store(out_ptr + D, tl.sum(squares, 0), mask=columns < D)


@triton.jit
def _moments_of_head(ptr, parts, count, D: tl.constexpr, BD: tl.constexpr):
    """Mean and mean square of `count` tokens, from the `sampled_moments` of one head."""
    AT_ONCE: tl.constexpr = 32
    columns = tl.arange(0, BD)
    total = tl.zeros([AT_ONCE, BD], tl.float32)
    squares = tl.zeros([AT_ONCE, BD], tl.float32)
    for start in range(0, parts, AT_ONCE):
        part = start + tl.arange(0, AT_ONCE)[:, None]
        real = (part < parts) & (columns < D)[None, :]
        pointers = ptr + part * 2 * D + columns[None, :]
        total += tl.load(pointers, mask=real, other=0.0)
        squares += tl.load(pointers + D, mask=real, other=0.0)
    return tl.sum(total, 0) / count, tl.sum(squares, 0) / count


@triton.jit
def join_moments(
    q_ptr, k_ptr, count_ptr, mean_ptr, balance_ptr, H, q_parts, k_parts, q_count, k_count,
    LARGEST: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """`reference.mean_and_balance` of one head, from its `sampled_moments`. count_ptr: fp32 `[B]`,
    how many keys there are in those, or None: k_count in all."""
    head = tl.program_id(0).to(tl.int64)
    if count_ptr is not None:
        k_count = tl.load(count_ptr + tl.program_id(0) // H)
    _, of_q = _moments_of_head(q_ptr + head * q_parts * 2 * D, q_parts, q_count, D, BD)
    mean, of_k = _moments_of_head(k_ptr + head * k_parts * 2 * D, k_parts, k_count, D, BD)
    # Of a mean above some thousand deviations the difference is noise, and the exponent may be off:
    # the products are right with any.
    exponent = tl.floor(0.25 * tl.log2((of_k - mean * mean) / of_q) + 0.5)
    exponent = tl.where(tl.abs(exponent) < float("inf"), exponent, 0.0)
    exponent = tl.minimum(tl.maximum(exponent, -LARGEST * 1.0), LARGEST * 1.0)
    columns = tl.arange(0, BD)
    tl.store(mean_ptr + head * D + columns, mean, mask=columns < D)
    tl.store(balance_ptr + head * D + columns, tl.exp2(exponent), mask=columns < D)


def mean_and_balance(q: Tensor, k: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `reference.mean_and_balance`."""
    B, H, N, D = k.shape
    of_q, of_k = _moments(q, None, queries=True), _moments(k, real, queries=False)
    count = None
    if real is not None:
        # Not by indexing, for which a GPU would have to be waited for.
        among = real & sampled(N, k.device)
        count = among.sum(1, dtype=torch.float32).clamp(min=1).expand(B).contiguous()
    mean, balance = torch.empty(2, B, H, D, dtype=torch.float32, device=k.device)
    with torch.cuda.device_of(q):
        join_moments[(B * H,)](
            of_q, of_k, count, mean, balance, H, of_q.shape[2], of_k.shape[2],
            float(samples(q.shape[2])), float(samples(N)), LARGEST=LARGEST_BALANCE, D=D,
            BD=triton.next_power_of_2(D),
        )  # fmt: skip
    return mean, balance


def value_scales(v: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scales of v in e4m3, and their reciprocals, fp32 `[B, H, D]`."""
    B, H, N, D = v.shape
    parts = triton.cdiv(N, LARGEST_ROWS * LARGEST_TILES)
    out = torch.empty(B, H, parts, D, dtype=torch.float32, device=v.device)
    scale, inverse = torch.empty(2, B, H, D, dtype=torch.float32, device=v.device)
    with torch.cuda.device_of(v):
        largest_magnitudes[(parts, B * H)](
            v, real, out, *v.stride()[:3], batch_stride(real), H, N,
            TILES=LARGEST_TILES, **launch_shape(D, LARGEST_ROWS),
        )  # fmt: skip
        join_largest[(B * H,)](
            out, scale, inverse, parts, SMALLEST_SCALE,
            LARGEST=E4M3_LARGEST, D=D, BD=triton.next_power_of_2(D),
        )  # fmt: skip
    return scale, inverse


def _moments(x: Tensor, real: Tensor | None, queries: bool) -> Tensor:
    """`sampled_moments` of parts of the sequence, fp32 `[B, H, parts, 2, D]`."""
    B, H, N, D = x.shape
    parts = triton.cdiv(triton.cdiv(N, EVERY) * SAMPLED, MOMENT_ROWS * MOMENT_TILES)
    out = torch.empty(B, H, parts, 2, D, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        sampled_moments[(parts, B * H)](
            x, real, out, *x.stride()[:3], batch_stride(real), H, N, HUGE,
            QUERIES=queries, SAMPLED=SAMPLED, EVERY=EVERY, TILES=MOMENT_TILES,
            **launch_shape(D, MOMENT_ROWS),
        )  # fmt: skip
    return out


def launch_shape(D: int, rows: int, warps: int = WARPS) -> dict[str, int]:
    """The constants and the option by which a kernel takes tiles of `rows` tokens."""
    return {"D": D, "BD": triton.next_power_of_2(D), "ROWS": rows, "num_warps": warps}


def batch_stride(real: Tensor | None) -> int:
    """Stride of the batch, 0 where one row is shared."""
    return 0 if real is None or real.shape[0] == 1 else real.stride(0)
