"""Pieces of the Hopper kernel: where a tile's list is, and the online softmax."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from vdit_sparse.kernels.block_sparse.hopper.assembly import (
    AS_BYTES,
    AS_WORD,
    IN_PLACE_32,
    IN_PLACE_64,
    LANDMARK_32,
    LANDMARK_64,
)

ROWS = gl.constexpr(64)  # queries of a consumer
LOG2_448 = gl.constexpr(8.807354922057604)  # of the largest number of e4m3
# Of the factor of integer scores: a block of zeros has a scale so small that a product of two is 0,
# and -inf * 0 is nan.
SMALLEST = gl.constexpr(1e-30)
OFFSET = gl.constexpr(12582912.0)  # 1.5 * 2^23, of integer scores as floating-point numbers

# Of partial sums of rows, where the products are: rows r and r + 8 in a thread, four threads a row.
PARTIAL = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[8, 0]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 4],
    )
)


@gluon.jit
def advance(slot, phase, STAGES: gl.constexpr):
    """The next place in a ring, and the parity of its barriers."""
    slot += 1
    wrapped = slot == STAGES
    return gl.where(wrapped, 0, slot), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def key_place(slot, phase, LONE: gl.constexpr):
    """Where the keys lie whose values have this place; LONE: one tile of keys for two of values."""
    if LONE:
        slot, phase = 0, slot
    return slot, phase


@gluon.jit
def hand_over(numbers, t):
    """The producer's warp writes the number of the tile whose queries come here."""
    numbers.store(gl.full([1], t, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))


@gluon.jit
def handed_over(numbers):
    """The same number, as a scalar of a consumer's four warps."""
    return gl.max(numbers.load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def block_at(list_ptr, position, full):
    """The key block at this position of a list; 0 before its start."""
    listed = gl.load(list_ptr + position, mask=(position >= 0) & (not full), other=0)
    return gl.where(full, gl.maximum(position, 0), listed)


@gluon.jit
def step_at(list_ptr, step, full, BLOCK_K: gl.constexpr, BN: gl.constexpr):
    """Key block and first key of a step, which takes BN keys; the last step comes first."""
    PARTS: gl.constexpr = BLOCK_K // BN
    block = block_at(list_ptr, (step + PARTS) // PARTS - 1, full)
    return block, block * BLOCK_K + (step + PARTS) % PARTS * BN


@gluon.jit
def place_of(t, order_ptr, kv_len_ptr, sizes, ROWS: gl.constexpr):
    """Batch row, head and first query of tile `t`, and the real keys of the batch row."""
    H, S, keys, _nk = sizes
    tiles = (S + ROWS - 1) // ROWS
    # Head-major, so that a head's keys stay in L2; last rows first, for the dense rows of text.
    head = t // tiles
    row = tiles - 1 - t % tiles
    if order_ptr is not None:
        row = gl.load(order_ptr + t)
    m0 = row * ROWS
    b, h = head // H, head % H
    length = keys
    if kv_len_ptr is not None:
        length = gl.minimum(keys, gl.maximum(gl.load(kv_len_ptr + b), 0))
    return b, h, m0, length


@gluon.jit
def list_of(b, h, row, lists, strides, nk, length, BLOCK_K: gl.constexpr):
    """The list of query block `row`, how many of its entries have real keys, and whether it is the
    whole row."""
    idx_ptr, cnt_ptr, kv_len_ptr, _order_ptr = lists
    idx_b, idx_h, idx_q, cnt_b, cnt_h, cnt_q = strides
    b64, h64, row64 = b.to(gl.int64), h.to(gl.int64), row.to(gl.int64)
    list_ptr = idx_ptr + b64 * idx_b + h64 * idx_h + row64 * idx_q
    n = gl.load(cnt_ptr + b64 * cnt_b + h64 * cnt_h + row64 * cnt_q)
    full = n == nk
    if kv_len_ptr is not None:
        limit = (length + BLOCK_K - 1) // BLOCK_K
        n = gl.where(full, gl.minimum(n, limit), n)
        while (n > 0) & (block_at(list_ptr, n - 1, full) >= limit):
            n -= 1
    return list_ptr, n, full


@gluon.jit
def tile_of(
    t, lists, strides, sizes,
    ROWS: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, BN: gl.constexpr,
):  # fmt: skip
    """Batch row, head and first query of tile `t`; its list, how many steps of BN keys have real
    ones, whether it is the whole row; and the real keys of the batch row."""
    b, h, m0, length = place_of(t, lists[3], lists[2], sizes, ROWS)
    list_ptr, n, full = list_of(b, h, m0 // BLOCK_Q, lists, strides, sizes[3], length, BLOCK_K)
    steps = n * (BLOCK_K // BN)
    if BN < BLOCK_K:
        # Of the block that straddles the end, without the steps that lie behind it.
        real = gl.minimum(length - block_at(list_ptr, n - 1, full) * BLOCK_K, BLOCK_K)
        steps -= gl.where(n > 0, (BLOCK_K - real) // BN, 0)
    return b, h, m0, list_ptr, steps, full, length


@gluon.jit
def real_in_step(block, start, steps, length, valid_ptr, BLOCK_K: gl.constexpr, BN: gl.constexpr):
    """How many of the BN keys from `start` on are real; none in an empty list."""
    end = length
    if valid_ptr is not None:
        end = gl.minimum(end, block * BLOCK_K + gl.load(valid_ptr + block))
    return gl.where(steps > 0, gl.maximum(gl.minimum(end - start, BN), 0), 0)


@gluon.jit
def zero_from(tile, real, KEYS: gl.constexpr, D: gl.constexpr):
    """Rows from `real` on of a tile in shared memory become zero: 0 * nan is nan.

    Both consumers do it, writing the same zeros.
    """
    CHUNK: gl.constexpr = 16
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    if real < KEYS:
        for i in gl.static_range(KEYS // CHUNK):
            if real < (i + 1) * CHUNK:
                part = tile.slice(i * CHUNK, CHUNK)
                rows = i * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(1, layout))
                part.store(gl.where((rows < real)[:, None], part.load(layout), 0.0))
        fence_async_shared()
        gl.thread_barrier()


@gluon.jit
def scores_of(products):
    """fp32 of a tile of products; of integers, `OFFSET` more than they are. Those are below 2^22,
    which 127^2 * D is for D <= 256, so that their bits can be added to those of 1.5 * 2^23: cheaper
    than a conversion, which shares its unit with the exponentials."""
    if products.dtype == gl.int32:
        scores = (products + 0x4B400000).to(gl.float32, bitcast=True)
    else:
        scores = products
    return scores


@gluon.jit
def masked(scores, real, layout: gl.constexpr, KEYS: gl.constexpr):
    """-inf from column `real` on."""
    if real < KEYS:
        columns = gl.arange(0, KEYS, gl.SliceLayout(0, layout))
        scores = gl.where((columns < real)[None, :], scores, float("-inf"))
    return scores


@gluon.jit
def finite(peak, GUARD: gl.constexpr):
    """`peak`, or 0 for a row that has seen masked keys only: -inf - -inf is nan."""
    if GUARD:
        peak = gl.where(peak == float("-inf"), 0.0, peak)
    return peak


@gluon.jit
def largest_of(scores, layout: gl.constexpr):
    """The largest score of each row, in the layout of rows of `layout`. Integers as their products
    are: three are compared at a time, in several chains."""
    if scores.dtype == gl.int32:
        KEYS: gl.constexpr = scores.shape[1]
        some = gl.max(scores.reshape([ROWS, 2, KEYS // 16, 8]), 2)
        peak = gl.max(some.reshape([ROWS, 16]), 1).to(gl.float32)
        peak = gl.convert_layout(peak, gl.SliceLayout(1, layout))
    else:
        peak = gl.max(scores, 1)
    return peak


@gluon.jit
def peak_of(scores, factor, layout: gl.constexpr, INT8: gl.constexpr, FP8: gl.constexpr):
    """Largest score of each row in log2 units; in fp8 low by log2(448), which makes the weights,
    and their sum, larger by 448."""
    peak = largest_of(scores, layout)
    if INT8 and scores.dtype == gl.float32:
        peak -= OFFSET
    peak *= factor
    if FP8:
        peak -= LOG2_448
    return peak


@gluon.jit
def weights_of(scores, factor, peak, P: gl.constexpr, number: gl.constexpr,
               INT8: gl.constexpr, LANDMARK: gl.constexpr, GUARD: gl.constexpr):  # fmt: skip
    """exp2(factor * scores - shift) as an operand of the next product, in fp8 as fp32 numbers for
    `words_of`, and its `partial_sums`; `peak` and shift, which are the same but for rows that have
    seen masked keys only (GUARD).

    INT8: what takes the scores' offset off again is one rounded number for each row, of up to
    factor * 2^24. Its rounding, upwards, is put into `peak`, which so stays exact to all blocks.
    (Downwards where it is negative: then by less than a weight's conversion rounds.)
    """
    if scores.dtype == gl.int32:
        scores = scores_of(scores)
    shift = finite(peak, GUARD)
    if INT8:
        zero = gl.zeros_like(shift)
        lost = gl.fma(factor + zero, OFFSET + zero, shift)
        lost = gl.fma(lost, 2.384185791015625e-07 + zero, lost)
        shift = gl.fma(-factor + zero, OFFSET + zero, lost)
        peak = gl.where(peak == float("-inf"), peak, shift) if GUARD else shift
        powers = gl.fma(
            scores, factor + gl.zeros_like(scores), -lost[:, None] + gl.zeros_like(scores)
        )
    else:
        powers = scores * factor - shift[:, None]
    p = gl.exp2(powers)
    if LANDMARK:
        p = with_landmark(p)
    total = partial_sums(p)
    if number != gl.float8e4nv:
        p = gl.convert_layout(p.to(number), P)
    return p, total, peak, shift


@gluon.jit
def partial_sums(p):
    """Sums of rows over what one thread has of them, `[ROWS, 4]`: the four that share a row need
    their sum at the end of its list only."""
    KEYS: gl.constexpr = p.shape[1]
    return gl.convert_layout(gl.sum(gl.sum(p.reshape([ROWS, KEYS // 8, 4, 2]), 3), 1), PARTIAL)


@gluon.jit
def rescaled(total, alpha):
    """Partial sums times a factor of their rows."""
    return total * gl.convert_layout(alpha, gl.SliceLayout(1, PARTIAL))[:, None]


@gluon.jit
def with_landmark(p):
    """The weights, unchanged. ptxas takes the wait for a product as far up as it can, before all
    exponentials; from here on their second half runs beside it, and beside what comes after it."""
    if p.shape[1] == 64:
        p = gl.inline_asm_elementwise(
            LANDMARK_32, IN_PLACE_32, [p], gl.float32, is_pure=False, pack=32
        )
    else:
        p = gl.inline_asm_elementwise(
            LANDMARK_64, IN_PLACE_64, [p], gl.float32, is_pure=False, pack=64
        )
    return p


@gluon.jit
def words_of(p):
    """Weights `[ROWS, keys]` as e4m3 numbers, four to a word: int32 `[ROWS, keys / 4]`.

    A thread has columns 2t, 2t + 1 of each 8, but of an 8-bit operand four neighbours of each 16:
    with the keys of each 16 in another order, which the values have too, they are the same. Words,
    because bytes that live through a loop are taken apart and put together in it.
    """
    KEYS: gl.constexpr = p.shape[1]
    groups = p.reshape([ROWS, KEYS // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4))
    even, odd = gl.split(groups.reshape([ROWS, KEYS // 4, 2, 2]))
    a, c = gl.split(even)
    b, d = gl.split(odd)
    return gl.inline_asm_elementwise(
        AS_WORD, "=r,f,f,f,f", [a, b, c, d], gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def operand_of(words, P: gl.constexpr):
    """The words of `words_of` as an operand of e4m3 numbers, `[ROWS, keys]`. To be made before any
    product of the step starts, or else ptxas lets each wait for the one before."""
    KEYS: gl.constexpr = 4 * words.shape[1]
    pairs = gl.join(words, words)
    copies = gl.convert_layout(gl.join(pairs, pairs).reshape([ROWS, KEYS]), P)
    return gl.inline_asm_elementwise(
        AS_BYTES, "=r,r,r,r,r", [copies], gl.float8e4nv, is_pure=True, pack=4
    )
