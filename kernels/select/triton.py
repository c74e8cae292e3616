"""The Triton backend: k-th values by bisection or radix selection, lists by prefix sums.

All comparisons are of int32 keys in the order of the fp32 scores, so that the result is exact.
Letters: `B H nq nk` as in the public functions; strides are named after tensor and dimension.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdit_sparse.kernels.triton_ops import why_not_on

LARGEST_NK = 8192
ROWS = 16  # rows of a map that one program counts: fewer atomic sums, still enough programs
LOWEST = tl.constexpr(-(2**31))  # no number has this key: padding and blocks without real tokens
LARGEST = tl.constexpr(2**31 - 1)
INFINITY = tl.constexpr(0x7F800000)  # the bits of +inf
MINUS_INFINITY = tl.constexpr(-0x00800000)  # the bits of -inf as int32


@triton.jit
def _is_nan(bits):
    return (bits & LARGEST) > INFINITY


@triton.jit
def _keys(bits):
    """Integers in the order of the fp32 numbers with these bits; NaN as -inf, -0 as 0."""
    bits = tl.where(_is_nan(bits), MINUS_INFINITY, bits)
    bits = tl.where(bits == LOWEST, 0, bits)
    return bits ^ ((bits >> 31) & LARGEST)


@triton.jit
def _place(row, H, nq):
    """(b, h, q) of a row of the maps."""
    return row // nq // H, row // nq % H, row % nq


@triton.jit
def _keys_of_row(score_ptr, valid_ptr, b, h, q, score_b, score_h, score_q, columns, nk):
    real = columns < nk
    bits = tl.load(
        score_ptr + b * score_b + h * score_h + q * score_q + columns, mask=real, other=0
    )
    if valid_ptr is not None:
        real = real & (tl.load(valid_ptr + columns, mask=real, other=0) > 0)
    return tl.where(real, _keys(bits), LOWEST)


@triton.jit
def _store_row(
    chosen, key, keep_ptr, cnt_ptr, always_ptr, row, b, h, q,
    always_b, always_h, always_q, always_k, columns, nk,
):  # fmt: skip
    """Adds the blocks of `always`, drops those that cannot be kept, and stores row and count."""
    if always_ptr is not None:
        start = always_ptr + b * always_b + h * always_h + q * always_q
        chosen = chosen | (tl.load(start + columns * always_k, mask=columns < nk, other=0) != 0)
    chosen = (chosen & (key != LOWEST)).to(tl.int32)
    tl.store(keep_ptr + row * nk + columns, chosen.to(tl.uint8), mask=columns < nk)
    tl.store(cnt_ptr + row, tl.sum(chosen, 0))


@triton.jit
def top_of_rows(
    score_ptr, valid_ptr, always_ptr, count_ptr, keep_ptr, cnt_ptr,
    score_b, score_h, score_q, always_b, always_h, always_q, always_k, count_b, count_h, count_q,
    H, nq, nk, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row: bisects for the k-th key and takes equal ones from the left."""
    row = tl.program_id(0).to(tl.int64)
    b, h, q = _place(row, H, nq)
    columns = tl.arange(0, BLOCK)
    key = _keys_of_row(score_ptr, valid_ptr, b, h, q, score_b, score_h, score_q, columns, nk)
    candidates = tl.sum((key != LOWEST).to(tl.int32), 0)
    wanted = tl.load(count_ptr + b * count_b + h * count_h + q * count_q)
    k = tl.minimum(tl.maximum(wanted, 0), candidates).to(tl.int32)
    # The largest key that at least k keys reach: its sign, then bit by bit.
    kth = tl.where(tl.sum((key >= 0).to(tl.int32), 0) >= k, 0, LOWEST)
    for i in range(31):
        higher = kth + (1 << (30 - i))
        kth = tl.where(tl.sum((key >= higher).to(tl.int32), 0) >= k, higher, kth)
    equal = (key == kth).to(tl.int32)
    taken = k - tl.sum((key > kth).to(tl.int32), 0)
    chosen = (key > kth) | ((key == kth) & (tl.cumsum(equal, 0) <= taken))
    _store_row(
        chosen, key, keep_ptr, cnt_ptr, always_ptr, row, b, h, q,
        always_b, always_h, always_q, always_k, columns, nk,
    )  # fmt: skip


@triton.jit
def rows_above(
    score_ptr, valid_ptr, always_ptr, threshold_ptr, keep_ptr, cnt_ptr,
    score_b, score_h, score_q, always_b, always_h, always_q, always_k, threshold_b, threshold_h,
    H, nq, nk, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row: keys of at least the threshold's."""
    row = tl.program_id(0).to(tl.int64)
    b, h, q = _place(row, H, nq)
    columns = tl.arange(0, BLOCK)
    key = _keys_of_row(score_ptr, valid_ptr, b, h, q, score_b, score_h, score_q, columns, nk)
    bits = tl.load(threshold_ptr + b * threshold_b + h * threshold_h)
    chosen = key >= tl.where(_is_nan(bits), LARGEST, _keys(bits))
    _store_row(
        chosen, key, keep_ptr, cnt_ptr, always_ptr, row, b, h, q,
        always_b, always_h, always_q, always_k, columns, nk,
    )  # fmt: skip


@triton.jit
def _narrow(bins_ptr, wanted, DIGITS: tl.constexpr):
    """(the leading digits of the k-th largest key, how many of the keys that have them are among
    the k), from how often each digit occurs among keys with the digits before it."""
    digits = tl.arange(0, 256)
    prefix = tl.full([], 0, tl.int32)
    k = tl.maximum(wanted, 0)
    for i in tl.static_range(DIGITS):
        bins = tl.load(bins_ptr + i * 256 + digits)
        reached = tl.sum(bins, 0) - tl.cumsum(bins, 0) + bins  # keys of this digit or a higher one
        if i == 0:
            k = tl.minimum(k, tl.sum(bins, 0)).to(tl.int32)
        digit = tl.sum((reached >= k).to(tl.int32), 0) - 1
        k -= tl.sum(tl.where(digits > digit, bins, 0), 0)
        prefix = prefix * 256 + (digit - 128 if i == 0 else digit)
    return prefix, k


@triton.jit
def count_digits(
    score_ptr, valid_ptr, count_ptr, bins_ptr,
    score_b, score_h, score_q, count_b, count_h,
    H, nq, nk, DIGIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for ROWS rows: how often each value of a digit (8 bits, the highest first) occurs
    in the head's map among the keys that share the k-th key's digits before it."""
    parts = tl.cdiv(nq, ROWS)
    head = (tl.program_id(0) // parts).to(tl.int64)
    first = tl.program_id(0) % parts * ROWS
    b, h = head // H, head % H
    bins_ptr += head * 1024
    prefix, _ = _narrow(bins_ptr, tl.load(count_ptr + b * count_b + h * count_h), DIGIT)
    columns = tl.arange(0, BLOCK)
    bins = tl.zeros([256], tl.int32)
    for q in range(first, tl.minimum(first + ROWS, nq)):
        key = _keys_of_row(
            score_ptr, valid_ptr, b, h, tl.cast(q, tl.int64),
            score_b, score_h, score_q, columns, nk,
        )  # fmt: skip
        digit = (key >> (24 - 8 * DIGIT)) & 255
        counted = key != LOWEST
        if DIGIT == 0:
            digit = digit ^ 128  # signed keys: negative ones have the lower digits
        else:
            counted = counted & ((key >> (32 - 8 * DIGIT)) == prefix)
        bins += tl.histogram(digit, 256, mask=counted)
    digits = tl.arange(0, 256)
    tl.atomic_add(bins_ptr + DIGIT * 256 + digits, bins, mask=bins > 0)


@triton.jit
def count_equal(
    score_ptr, valid_ptr, count_ptr, bins_ptr, equal_ptr,
    score_b, score_h, score_q, count_b, count_h,
    H, nq, nk, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row: how many of its keys equal the k-th of the head."""
    row = tl.program_id(0).to(tl.int64)
    b, h, q = _place(row, H, nq)
    kth, _ = _narrow(bins_ptr + row // nq * 1024, tl.load(count_ptr + b * count_b + h * count_h), 4)
    columns = tl.arange(0, BLOCK)
    key = _keys_of_row(score_ptr, valid_ptr, b, h, q, score_b, score_h, score_q, columns, nk)
    tl.store(equal_ptr + row, tl.sum((key == kth).to(tl.int32), 0))


@triton.jit
def top_of_maps(
    score_ptr, valid_ptr, always_ptr, count_ptr, bins_ptr, equal_ptr, keep_ptr, cnt_ptr,
    score_b, score_h, score_q, always_b, always_h, always_q, always_k, count_b, count_h,
    H, nq, nk, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row: keys above the k-th of the head, and equal ones while there is room."""
    row = tl.program_id(0).to(tl.int64)
    b, h, q = _place(row, H, nq)
    kth, taken = _narrow(
        bins_ptr + row // nq * 1024, tl.load(count_ptr + b * count_b + h * count_h), 4
    )
    earlier = tl.zeros([256], tl.int32)
    for first in range(0, q.to(tl.int32), 256):
        rows = first + tl.arange(0, 256)
        earlier += tl.load(equal_ptr + row // nq * nq + rows, mask=rows < q, other=0)
    columns = tl.arange(0, BLOCK)
    key = _keys_of_row(score_ptr, valid_ptr, b, h, q, score_b, score_h, score_q, columns, nk)
    equal = (key == kth).to(tl.int32)
    rank = tl.sum(earlier, 0) + tl.cumsum(equal, 0)
    chosen = (key > kth) | ((key == kth) & (rank <= taken))
    _store_row(
        chosen, key, keep_ptr, cnt_ptr, always_ptr, row, b, h, q,
        always_b, always_h, always_q, always_k, columns, nk,
    )  # fmt: skip


@triton.jit
def list_columns(keep_ptr, idx_ptr, nk, cap, BLOCK: tl.constexpr):
    """One program a row: column c goes to place (kept columns before c); zeros behind them."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    keep = tl.load(keep_ptr + row * nk + columns, mask=columns < nk, other=0) != 0
    place = tl.cumsum(keep.to(tl.int32), 0) - 1
    kept = tl.sum(keep.to(tl.int32), 0)
    idx_ptr += row * cap
    tl.store(idx_ptr + place, columns, mask=keep & (place < cap))
    tl.store(idx_ptr + columns, tl.zeros_like(columns), mask=(columns >= kept) & (columns < cap))


def supports(x: Tensor) -> str | None:
    """None if this backend computes a call for the map `x`, else the reason why it does not."""
    if x.shape[-1] > LARGEST_NK:
        return f"a row has at most {LARGEST_NK} key blocks, got {x.shape[-1]}"
    return why_not_on(x.device)


def top(
    score: Tensor, count: Tensor, per: str, always: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `reference.top`."""
    score = _rows_in_one_piece(score)
    maps = _maps(score, valid)
    forced, forced_strides = _forced(always)
    keep, cnt = _empty(score)
    # Counts shared by rows, heads or the batch come as views of stride 0.
    strides = (*score.stride()[:3], *forced_strides, *count.stride())
    sizes, options = score.shape[1:], _options(score)
    grid = (cnt.numel(),)
    with torch.cuda.device_of(score):
        if per == "row":
            top_of_rows[grid](*maps, forced, count, keep, cnt, *strides, *sizes, **options)
        else:
            bins, equal = _count(maps, score, count)
            top_of_maps[grid](
                *maps, forced, count, bins, equal, keep, cnt, *strides, *sizes, **options
            )
    return keep.view(torch.bool), cnt


def above(
    score: Tensor, threshold: Tensor, always: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `reference.above`."""
    score = _rows_in_one_piece(score)
    forced, forced_strides = _forced(always)
    keep, cnt = _empty(score)
    with torch.cuda.device_of(score):
        rows_above[(cnt.numel(),)](
            *_maps(score, valid), forced, threshold.view(torch.int32), keep, cnt,
            *score.stride()[:3], *forced_strides, *threshold.stride(), *score.shape[1:],
            **_options(score),
        )  # fmt: skip
    return keep.view(torch.bool), cnt


def lists(keep: Tensor, cap: int) -> Tensor:
    """See `ascending_lists`."""
    idx = torch.empty(*keep.shape[:3], cap, dtype=torch.int32, device=keep.device)
    with torch.cuda.device_of(keep):
        list_columns[(keep.shape[:3].numel(),)](
            keep.contiguous().view(torch.uint8), idx, keep.shape[-1], cap, **_options(keep)
        )
    return idx


def _count(
    maps: tuple[Tensor, Tensor | None], score: Tensor, count: Tensor
) -> tuple[Tensor, Tensor]:
    """The digits of each head, int32 `[B * H, 4, 256]`, and the equal keys of each row."""
    B, H, nq, _ = score.shape
    bins = torch.zeros(B * H, 4, 256, dtype=torch.int32, device=score.device)
    equal = torch.empty(B, H, nq, dtype=torch.int32, device=score.device)
    numbers = (*score.stride()[:3], *count.stride(), *score.shape[1:])
    options = _options(score)
    # Narrow rows have no keys for four warps, and the bins take registers beside the keys.
    warps = max(min(4, options["BLOCK"] // 32), options["num_warps"])
    for digit in range(4):
        count_digits[(B * H * triton.cdiv(nq, ROWS),)](
            *maps, count, bins, *numbers,
            DIGIT=digit, ROWS=ROWS, BLOCK=options["BLOCK"], num_warps=warps,
        )  # fmt: skip
    count_equal[(B * H * nq,)](*maps, count, bins, equal, *numbers, **options)
    return bins, equal


def _maps(score: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The bits of the scores, and `valid` in one piece."""
    return score.view(torch.int32), None if valid is None else valid.contiguous()


def _rows_in_one_piece(score: Tensor) -> Tensor:
    return score if score.stride(-1) == 1 else score.contiguous()


def _forced(always: Tensor | None) -> tuple[Tensor | None, tuple[int, ...]]:
    """`always` as bytes, and its strides."""
    if always is None:
        return None, (0, 0, 0, 0)
    return always.view(torch.uint8), always.stride()


def _empty(score: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised keep, uint8 like `score`, and cnt, int32 `[B, H, nq]`."""
    keep = torch.empty(score.shape, dtype=torch.uint8, device=score.device)
    return keep, torch.empty(score.shape[:3], dtype=torch.int32, device=score.device)


def _options(x: Tensor) -> dict[str, int]:
    """How to launch a program that holds a row of `x` in registers."""
    width = max(32, triton.next_power_of_2(x.shape[-1]))
    # 32 keys a thread; sums within one warp need no shared memory.
    return {"BLOCK": width, "num_warps": max(1, width // 1024)}
