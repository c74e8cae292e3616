"""The Hopper kernel, in Gluon: one producer warp, one or two warpgroups of 64 queries each.

FlashAttention-3's structure (arXiv 2407.08608): the producer fills rings of K and V tiles by TMA;
each consumer has the products of the next scores and of the last weights in flight while it takes
exponentials, and its weights stay in registers. Every row's list is walked from its end, so that
the one block that may straddle the end of the keys comes first, outside the loop. Letters: `B H S
D` as in the public function; a tile is CONSUMERS * 64 queries by BN keys. A PERSISTENT program
takes tile after tile from a counter that all share: the producer, which hands a tile's number to
the consumers with its queries.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)

from vdit_sparse.kernels.block_sparse.hopper.parts import (
    ROWS,
    SMALLEST,
    advance,
    hand_over,
    handed_over,
    key_place,
    masked,
    operand_of,
    peak_of,
    real_in_step,
    scores_of,
    step_at,
    tile_of,
    weights_of,
    words_of,
    zero_from,
)
from vdit_sparse.kernels.block_sparse.hopper.steps import (
    start_scores,
    start_values,
    step,
    step_or_skip,
    store_outputs,
)


@gluon.jit
def _produce(
    descriptors, buffers, barriers, numbers, taken_ptr, lists, strides, sizes, total,
    D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, BN: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PERSISTENT: gl.constexpr,
):  # fmt: skip
    """Queries of each tile, then the keys and values of its list."""
    q_desc, k_desc, v_desc, _ = descriptors
    FP8: gl.constexpr = v_desc.dtype == gl.float8e4nv
    q_smem, k_smem, v_smem = buffers
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, _ = barriers
    Q_BYTES: gl.constexpr = ROWS * D * q_desc.dtype.primitive_bitwidth // 8
    K_BYTES: gl.constexpr = BN * D * k_desc.dtype.primitive_bitwidth // 8
    V_BYTES: gl.constexpr = BN * D * v_desc.dtype.primitive_bitwidth // 8
    LONE: gl.constexpr = k_smem.shape[0] != v_smem.shape[0]
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    parity = gl.to_tensor(1)
    t = gl.program_id(0)
    while t < total:
        b, h, m0, list_ptr, steps, full, _length = tile_of(
            t, lists, strides, sizes, CONSUMERS * ROWS, BLOCK_Q, BLOCK_K, BN
        )
        _block, start = step_at(list_ptr, steps - 1, full, BLOCK_K, BN)
        for w in gl.static_range(CONSUMERS):
            if PERSISTENT:
                mbarrier.wait(q_empty.index(w), parity)
                hand_over(numbers.index(w), t)
            mbarrier.expect(q_ready.index(w), Q_BYTES)
            tma.async_copy_global_to_shared(
                q_desc, [b, h, m0 + w * ROWS, 0], q_ready.index(w), q_smem.index(w)
            )
        parity ^= 1
        for i in range(gl.maximum(steps, 1)):
            k_slot, k_phase = key_place(slot, phase, LONE)
            mbarrier.wait(k_empty.index(k_slot), k_phase ^ 1)
            mbarrier.expect(k_ready.index(k_slot), K_BYTES)
            tma.async_copy_global_to_shared(
                k_desc, [b, h, start, 0], k_ready.index(k_slot), k_smem.index(k_slot)
            )
            mbarrier.wait(v_empty.index(slot), phase ^ 1)
            mbarrier.expect(v_ready.index(slot), V_BYTES)
            if FP8:
                tma.async_copy_global_to_shared(
                    v_desc, [b, h, 0, start], v_ready.index(slot), v_smem.index(slot)
                )
            else:
                tma.async_copy_global_to_shared(
                    v_desc, [b, h, start, 0], v_ready.index(slot), v_smem.index(slot)
                )
            slot, phase = advance(slot, phase, STAGES)
            _block, start = step_at(list_ptr, steps - 2 - i, full, BLOCK_K, BN)
        t = total
        if PERSISTENT:
            # Every program begins with the tile of its own number.
            t = gl.num_programs(0) + gl.atomic_add(taken_ptr, 1, sem="relaxed")
    if PERSISTENT:
        for w in gl.static_range(CONSUMERS):
            mbarrier.wait(q_empty.index(w), parity)
            hand_over(numbers.index(w), t)
            mbarrier.arrive(q_ready.index(w))


@gluon.jit
def _consume(
    descriptors, buffers, barriers, numbers, o_smem, scales, lists, valid_ptr, skips_ptr, lse_ptr,
    strides, sizes, scale, skip_log2, tiles,
    W: gl.constexpr, D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
    BN: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PERSISTENT: gl.constexpr,
    PINGPONG: gl.constexpr, LANDMARK: gl.constexpr,
):  # fmt: skip
    """Attention of the 64 queries `W * 64 ...` of each tile."""
    VALID: gl.constexpr = valid_ptr is not None
    SKIP: gl.constexpr = skips_ptr is not None
    INT8: gl.constexpr = descriptors[1].dtype == gl.int8
    FP8: gl.constexpr = descriptors[2].dtype == gl.float8e4nv
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32 if INT8 else 16])
    O_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32 if FP8 else 16])
    P_L: gl.constexpr = gl.DotOperandLayout(0, O_L, 4 if FP8 else 2)
    number: gl.constexpr = descriptors[2].dtype
    q_smem, k_smem, v_smem = buffers
    LONE: gl.constexpr = k_smem.shape[0] != v_smem.shape[0]
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, _turns = barriers
    q_scale_ptr, k_scale_ptr, v_scale_ptr, shift_ptr = scales
    H, S, _keys, nk = sizes
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    parity = gl.to_tensor(0)
    t = gl.program_id(0)
    if PERSISTENT:
        mbarrier.wait(q_ready.index(W), parity)
        t = handed_over(numbers.index(W))
    while t < tiles:
        b, h, m0, list_ptr, steps, full, length = tile_of(
            t, lists, strides, sizes, CONSUMERS * ROWS, BLOCK_Q, BLOCK_K, BN
        )
        head = (b * H + h).to(gl.int64)
        to_log2 = scale * 1.4426950408889634
        block, start = step_at(list_ptr, steps - 1, full, BLOCK_K, BN)
        real = real_in_step(block, start, steps, length, valid_ptr, BLOCK_K, BN)
        factor = to_log2
        key_scale = to_log2
        k_row = head * nk
        if INT8:
            nq = (S + BLOCK_Q - 1) // BLOCK_Q
            to_log2 *= gl.load(q_scale_ptr + head * nq + m0 // BLOCK_Q)
            factor = gl.maximum(to_log2 * gl.load(k_scale_ptr + k_row + block), SMALLEST)
            block, _start = step_at(list_ptr, steps - 2, full, BLOCK_K, BN)
            key_scale = gl.load(k_scale_ptr + k_row + block)
            block, _start = step_at(list_ptr, steps - 3, full, BLOCK_K, BN)
        if not PERSISTENT:
            mbarrier.wait(q_ready.index(W), parity)
        q = q_smem.index(W).reshape([ROWS, D])
        k_slot, k_phase = key_place(slot, phase, LONE)
        started = start_scores(q, k_smem, k_ready, k_slot, k_phase, D, BN, S_L, INT8)
        scores = scores_of(warpgroup_mma_wait(0, [started]))
        mbarrier.arrive(k_empty.index(k_slot))
        if real < BN:
            scores = masked(scores, real, S_L, BN)
            if not FP8:
                mbarrier.wait(v_ready.index(slot), phase)
                zero_from(v_smem.index(slot).reshape([BN, D]), real, BN, D)
        peak = peak_of(scores, factor, S_L, INT8, FP8)
        p, total, peak, _shift = weights_of(scores, factor, peak, P_L, number, INT8, False, True)
        if FP8:
            p = words_of(p)
        acc = gl.zeros([ROWS, D], gl.float32, O_L)
        alpha = gl.full([ROWS], 1.0, gl.float32, gl.SliceLayout(1, O_L))
        rows = m0 + W * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, S_L))
        state = acc, p, peak, total, alpha, slot, phase, turn, key_scale, block
        row = list_ptr, steps, full, length, to_log2, k_row
        for i in range(1, 1 if SKIP else steps):
            state, real = step(
                i, state, real, q, row, valid_ptr, k_scale_ptr, buffers, barriers, W, D, BLOCK_K,
                BN, STAGES, S_L, O_L, P_L, number, PINGPONG, LANDMARK,
            )  # fmt: skip
        acc, p, peak, total, alpha, slot, phase, turn, _key_scale, _block = state
        if PERSISTENT and not SKIP:
            mbarrier.arrive(q_empty.index(W))
        mbarrier.wait(v_ready.index(slot), phase)
        if VALID and not FP8:
            zero_from(v_smem.index(slot).reshape([BN, D]), real, BN, D)
        if FP8:
            p = operand_of(p, P_L)
        started = start_values(p, acc, v_smem, slot, D, BN, O_L, FP8)
        product = warpgroup_mma_wait(0, [started])
        mbarrier.arrive(v_empty.index(slot))
        slot, phase = advance(slot, phase, STAGES)
        if FP8:
            product += acc * alpha[:, None]
        if SKIP:
            nq = (S + BLOCK_Q - 1) // BLOCK_Q
            row = list_ptr, steps, full, length, factor, (head * nq + m0 // BLOCK_Q) * nk
            done = product, peak, total, slot, phase
            for i in range(1, steps):
                done = step_or_skip(
                    i, done, q, row, valid_ptr, skips_ptr, skip_log2, buffers, barriers, rows >= S,
                    D, BLOCK_K, BN, STAGES, S_L, O_L, P_L, number,
                )  # fmt: skip
            product, peak, total, slot, phase = done
            if PERSISTENT:
                mbarrier.arrive(q_empty.index(W))
        total = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, S_L))
        share = 1.0 / gl.where(total > 0, total, 1.0)
        out = product * gl.convert_layout(share, gl.SliceLayout(1, O_L))[:, None]
        if FP8:
            columns = gl.arange(0, D, gl.SliceLayout(0, O_L))
            out *= gl.load(v_scale_ptr + head * D + columns)[None, :]
        # ln(sum of exp) from log2 units; a row without keys has peak = -inf.
        lse = (peak + gl.log2(total)) * 0.6931471805599453
        if INT8:
            lse += scale * gl.load(shift_ptr + head * S + rows, mask=rows < S, other=0.0)
        store_outputs(
            out, lse, o_smem, descriptors[3], lse_ptr, b, h, m0, head * S, S, W, D, S_L, PERSISTENT
        )  # fmt: skip
        t = tiles
        if PERSISTENT:
            parity ^= 1
            mbarrier.wait(q_ready.index(W), parity)
            t = handed_over(numbers.index(W))
    tma.store_wait(0)


# Lengths and strides change from call to call; none is worth a compilation of its own.
@gluon.jit(
    do_not_specialize=(
        "idx_b", "idx_h", "idx_q", "cnt_b", "cnt_h", "cnt_q", "H", "S", "keys", "nk", "tiles",
    )
)  # fmt: skip
def hopper_forward(
    q_desc, k_desc, v_desc, o_desc, q_scale_ptr, k_scale_ptr, v_scale_ptr, shift_ptr, lse_ptr,
    idx_ptr, cnt_ptr, valid_ptr, kv_len_ptr, order_ptr, taken_ptr, skips_ptr,
    idx_b, idx_h, idx_q, cnt_b, cnt_h, cnt_q, H, S, keys, nk, tiles, scale, skip_log2,
    D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, BN: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, KEY_STAGES: gl.constexpr,
    PERSISTENT: gl.constexpr, PINGPONG: gl.constexpr, LANDMARK: gl.constexpr,
    REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """See `block_sparse_attention`. Descriptors are 4-D. q_scale_ptr, k_scale_ptr, shift_ptr: of
    INT8 queries and keys, else None; v_scale_ptr: of e4m3 values, which lie transposed with the
    keys of each 16 in the order of `quantize_values(permuted=True)`, else None. order_ptr: int32
    `[tiles]`, each head's query blocks in the order of its tiles, or None: the last comes first.
    taken_ptr: a zero, int32, from which programs take tiles (PERSISTENT), else None. skips_ptr:
    int32 `[B, H, nq, nk]`, where tiles left out are counted, or None: none is."""
    INT8: gl.constexpr = q_scale_ptr is not None
    FP8: gl.constexpr = v_scale_ptr is not None
    V_ROWS: gl.constexpr = D if FP8 else BN
    V_COLUMNS: gl.constexpr = BN if FP8 else D
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, ROWS, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [KEY_STAGES, 1, 1, BN, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(
        v_desc.dtype, [STAGES, 1, 1, V_ROWS, V_COLUMNS], v_desc.layout
    )
    if PERSISTENT or INT8:
        o_smem = gl.allocate_shared_memory(o_desc.dtype, [CONSUMERS, 1, 1, ROWS, D], o_desc.layout)
    else:
        o_smem = q_smem
    NUMBERS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    numbers = gl.allocate_shared_memory(gl.int32, [CONSUMERS, 1], NUMBERS)
    LAYOUT: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], LAYOUT)
    q_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], LAYOUT)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], LAYOUT)
    k_ready = gl.allocate_shared_memory(gl.int64, [KEY_STAGES, 1], LAYOUT)
    k_empty = gl.allocate_shared_memory(gl.int64, [KEY_STAGES, 1], LAYOUT)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], LAYOUT)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], LAYOUT)
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    for i in gl.static_range(KEY_STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    fence_async_shared()
    descriptors = q_desc, k_desc, v_desc, o_desc
    buffers = q_smem, k_smem, v_smem
    barriers = q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, turns
    scales = q_scale_ptr, k_scale_ptr, v_scale_ptr, shift_ptr
    lists = idx_ptr, cnt_ptr, kv_len_ptr, order_ptr
    strides = idx_b, idx_h, idx_q, cnt_b, cnt_h, cnt_q
    sizes = H, S, keys, nk
    # Constants stay constants only in tuples that are written where they are passed.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (
                    descriptors, buffers, barriers, numbers, o_smem, scales, lists, valid_ptr,
                    skips_ptr, lse_ptr, strides, sizes, scale, skip_log2, tiles, 0, D, BLOCK_Q,
                    BLOCK_K, BN, CONSUMERS, STAGES, PERSISTENT, PINGPONG, LANDMARK,
                )),
                (_consume, (
                    descriptors, buffers, barriers, numbers, o_smem, scales, lists, valid_ptr,
                    skips_ptr, lse_ptr, strides, sizes, scale, skip_log2, tiles, 1, D, BLOCK_Q,
                    BLOCK_K, BN, CONSUMERS, STAGES, PERSISTENT, PINGPONG, LANDMARK,
                )),
                (_produce, (
                    descriptors, buffers, barriers, numbers, taken_ptr, lists, strides, sizes,
                    tiles, D, BLOCK_Q, BLOCK_K, BN, CONSUMERS, STAGES, PERSISTENT,
                )),
            ],
            [4, 1],
            [REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (
                    descriptors, buffers, barriers, numbers, o_smem, scales, lists, valid_ptr,
                    skips_ptr, lse_ptr, strides, sizes, scale, skip_log2, tiles, 0, D, BLOCK_Q,
                    BLOCK_K, BN, CONSUMERS, STAGES, PERSISTENT, False, LANDMARK,
                )),
                (_produce, (
                    descriptors, buffers, barriers, numbers, taken_ptr, lists, strides, sizes,
                    tiles, D, BLOCK_Q, BLOCK_K, BN, CONSUMERS, STAGES, PERSISTENT,
                )),
            ],
            [1],
            [PRODUCER_REGISTERS],
        )  # fmt: skip
