"""The Hopper kernel, in Gluon: one producer warp, one or two warpgroups of 64 queries each.

FlashAttention-3's structure (arXiv 2407.08608): the producer fills rings of K and V tiles by TMA;
each consumer has the products of the next scores and of the last weights in flight while it takes
exponentials, and its weights stay in registers. Every row's list is walked from its end, so that
the one block that may straddle the end of the keys comes first, outside the loop. Letters: `B H S
D` as in the public function; a tile is CONSUMERS * 64 queries by BN keys.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from vdit_sparse.kernels.block_sparse.hopper.parts import (
    GROWTH,
    advance,
    finite,
    masked,
    peak_of,
    real_in_step,
    scores_of,
    step_at,
    tile_of,
    weights_of,
    zero_from,
)

ROWS = gl.constexpr(64)  # queries of a consumer


@gluon.jit
def _produce(
    descriptors, buffers, barriers, lists, strides, sizes, total,
    D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, BN: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PERSISTENT: gl.constexpr, MERGED: gl.constexpr,
):  # fmt: skip
    """Queries of each tile, then the keys and values of its list."""
    q_desc, k_desc, v_desc, _ = descriptors
    FP8: gl.constexpr = v_desc.dtype == gl.float8e4nv
    q_smem, k_smem, v_smem = buffers
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, _ = barriers
    Q_BYTES: gl.constexpr = ROWS * D * q_desc.dtype.primitive_bitwidth // 8
    K_BYTES: gl.constexpr = BN * D * k_desc.dtype.primitive_bitwidth // 8
    V_BYTES: gl.constexpr = BN * D * v_desc.dtype.primitive_bitwidth // 8
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    parity = gl.to_tensor(1)
    for t in range(gl.program_id(0), total, gl.num_programs(0)):
        b, h, m0, list_ptr, steps, full, _length = tile_of(
            t, lists, strides, sizes, CONSUMERS * ROWS, BLOCK_Q, BLOCK_K, BN
        )
        _block, start = step_at(list_ptr, steps - 1, full, BLOCK_K, BN)
        for w in gl.static_range(CONSUMERS):
            if PERSISTENT:
                mbarrier.wait(q_empty.index(w), parity)
            mbarrier.expect(q_ready.index(w), Q_BYTES)
            tma.async_copy_global_to_shared(
                q_desc, [b, h, m0 + w * ROWS, 0], q_ready.index(w), q_smem.index(w)
            )
        parity ^= 1
        for i in range(gl.maximum(steps, 1)):
            mbarrier.wait(k_empty.index(slot), phase ^ 1)
            mbarrier.expect(k_ready.index(slot), K_BYTES)
            tma.async_copy_global_to_shared(
                k_desc, [b, h, start, 0], k_ready.index(slot), k_smem.index(slot)
            )
            if not MERGED:
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


@gluon.jit
def _scores(q, k_smem, k_ready, slot, phase, D: gl.constexpr, BN: gl.constexpr,
            S_L: gl.constexpr, INT8: gl.constexpr):  # fmt: skip
    """Starts the products of the queries and the keys of this slot."""
    kind: gl.constexpr = gl.int32 if INT8 else gl.float32
    zero = gl.zeros([ROWS, BN], kind, S_L)
    mbarrier.wait(k_ready.index(slot), phase)
    k = k_smem.index(slot).reshape([BN, D]).permute((1, 0))
    return warpgroup_mma(q, k, zero, use_acc=False, is_async=True)


@gluon.jit
def _values(p, acc, v_smem, slot, D: gl.constexpr, BN: gl.constexpr,
            O_L: gl.constexpr, FP8: gl.constexpr):  # fmt: skip
    """Starts the products of the weights and the values of this slot."""
    if FP8:
        v = v_smem.index(slot).reshape([D, BN]).permute((1, 0))
        # Hopper's own fp8 accumulator keeps about 14 bits: each tile starts a new one.
        zero = gl.zeros([ROWS, D], gl.float32, O_L)
        started = warpgroup_mma(p, v, zero, use_acc=False, is_async=True)
    else:
        v = v_smem.index(slot).reshape([BN, D])
        started = warpgroup_mma(p, v, acc, is_async=True)
    return started


@gluon.jit
def _step(
    i, state, real_last, q, row, valid_ptr, k_scale_ptr, buffers, barriers,
    W: gl.constexpr, D: gl.constexpr, BLOCK_K: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, S_L: gl.constexpr, O_L: gl.constexpr, P_L: gl.constexpr,
    number: gl.constexpr,
    PINGPONG: gl.constexpr, MERGED: gl.constexpr, LAZY: gl.constexpr, EMULATE: gl.constexpr,
):  # fmt: skip
    """Scores and weights of step `i`, values of the one before, of whose keys `real_last` are real;
    the new state, and how many keys of this step are real."""
    acc, p, peak, total, alpha, slot, phase, turn = state
    list_ptr, steps, full, length, to_log2, k_row = row
    _q_smem, k_smem, v_smem = buffers
    _q_ready, _q_empty, k_ready, k_empty, v_ready, v_empty, turns = barriers
    VALID: gl.constexpr = valid_ptr is not None
    INT8: gl.constexpr = k_smem.dtype == gl.int8
    FP8: gl.constexpr = number == gl.float8e4nv
    real = real_last
    factor = to_log2
    if VALID or INT8:
        block, start = step_at(list_ptr, steps - 1 - i, full, BLOCK_K, BN)
    if VALID:
        real = real_in_step(block, start, steps, length, valid_ptr, BLOCK_K, BN)
    if INT8:
        factor = to_log2 * gl.load(k_scale_ptr + k_row + block)
    last, last_phase = slot, phase
    slot, phase = advance(slot, phase, STAGES)
    if VALID:
        mbarrier.wait(v_ready.index(last), last_phase)
        if not FP8:
            zero_from(v_smem.index(last).reshape([BN, D]), real_last, BN, D)
    if PINGPONG:
        mbarrier.wait(turns.index(W), turn ^ (1 - W))
    scores_started = _scores(q, k_smem, k_ready, slot, phase, D, BN, S_L, INT8)
    if not VALID:
        mbarrier.wait(v_ready.index(last), last_phase)
    values_started = _values(p, acc, v_smem, last, D, BN, O_L, FP8)
    if PINGPONG:
        mbarrier.arrive(turns.index(1 - W))
        turn ^= 1
    scores = scores_of(warpgroup_mma_wait(1, [scores_started]))
    if not MERGED:
        mbarrier.arrive(k_empty.index(slot))
    if VALID:
        scores = masked(scores, real, S_L, BN)
    peak_new = gl.maximum(peak, peak_of(scores, factor, FP8))
    if LAZY:
        # Weights up to 2^GROWTH are as exact, and the last division makes up for the shift.
        moved = gl.max(peak_new - peak, 0) > GROWTH
        peak_new = gl.where(moved, peak_new, peak)
    shift = finite(peak_new, VALID)
    p, sums = weights_of(scores, factor, shift, P_L, number, EMULATE)
    alpha_new = gl.exp2(peak - shift)
    total = total * alpha_new + sums
    alpha_new = gl.convert_layout(alpha_new, gl.SliceLayout(1, O_L))
    product = warpgroup_mma_wait(0, [values_started])
    if MERGED:
        mbarrier.arrive(k_empty.index(last))
    else:
        mbarrier.arrive(v_empty.index(last))
    if FP8:
        acc = acc * alpha[:, None] + product
    elif LAZY:
        acc = product
        if moved:
            acc = acc * alpha_new[:, None]
    else:
        acc = product * alpha_new[:, None]
    return (acc, p, peak_new, total, alpha_new, slot, phase, turn), real


@gluon.jit
def _consume(
    descriptors, buffers, barriers, o_smem, scales, lists, valid_ptr, lse_ptr, strides, sizes,
    scale, tiles,
    W: gl.constexpr, D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
    BN: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PERSISTENT: gl.constexpr,
    PINGPONG: gl.constexpr, MERGED: gl.constexpr, LAZY: gl.constexpr, EMULATE: gl.constexpr,
    UNROLL: gl.constexpr,
):  # fmt: skip
    """Attention of the 64 queries `W * 64 ...` of each tile."""
    VALID: gl.constexpr = valid_ptr is not None
    INT8: gl.constexpr = descriptors[1].dtype == gl.int8
    FP8: gl.constexpr = descriptors[2].dtype == gl.float8e4nv
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32 if INT8 else 16])
    O_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32 if FP8 else 16])
    P_L: gl.constexpr = gl.DotOperandLayout(0, O_L, 4 if FP8 else 2)
    number: gl.constexpr = descriptors[2].dtype
    q_smem, k_smem, v_smem = buffers
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty, _turns = barriers
    q_scale_ptr, k_scale_ptr, v_scale_ptr, shift_ptr = scales
    H, S, _keys, nk = sizes
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    parity = gl.to_tensor(0)
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        b, h, m0, list_ptr, steps, full, length = tile_of(
            t, lists, strides, sizes, CONSUMERS * ROWS, BLOCK_Q, BLOCK_K, BN
        )
        head = (b * H + h).to(gl.int64)
        to_log2 = scale * 1.4426950408889634
        block, start = step_at(list_ptr, steps - 1, full, BLOCK_K, BN)
        real = real_in_step(block, start, steps, length, valid_ptr, BLOCK_K, BN)
        factor = to_log2
        k_row = head * nk
        if INT8:
            nq = (S + BLOCK_Q - 1) // BLOCK_Q
            to_log2 *= gl.load(q_scale_ptr + head * nq + m0 // BLOCK_Q)
            factor = to_log2 * gl.load(k_scale_ptr + k_row + block)
        mbarrier.wait(q_ready.index(W), parity)
        parity ^= 1
        q = q_smem.index(W).reshape([ROWS, D])
        started = _scores(q, k_smem, k_ready, slot, phase, D, BN, S_L, INT8)
        scores = scores_of(warpgroup_mma_wait(0, [started]))
        if not MERGED:
            mbarrier.arrive(k_empty.index(slot))
        if real < BN:
            scores = masked(scores, real, S_L, BN)
            if not FP8:
                mbarrier.wait(v_ready.index(slot), phase)
                zero_from(v_smem.index(slot).reshape([BN, D]), real, BN, D)
        peak = peak_of(scores, factor, FP8)
        p, total = weights_of(scores, factor, finite(peak, True), P_L, number, False)
        acc = gl.zeros([ROWS, D], gl.float32, O_L)
        alpha = gl.full([ROWS], 1.0, gl.float32, gl.SliceLayout(1, O_L))
        state = acc, p, peak, total, alpha, slot, phase, turn
        row = list_ptr, steps, full, length, to_log2, k_row
        first = gl.to_tensor(1)
        if UNROLL:
            first = gl.maximum(steps - (steps - 1) % 2, 1)
            for i in range(1, first, 2):
                for j in gl.static_range(2):
                    state, real = _step(
                        i + j, state, real, q, row, valid_ptr, k_scale_ptr, buffers, barriers, W, D,
                        BLOCK_K, BN, STAGES, S_L, O_L, P_L, number, PINGPONG, MERGED,
                        LAZY and not VALID, EMULATE and not VALID,
                    )  # fmt: skip
        for i in range(first, steps):
            state, real = _step(
                i, state, real, q, row, valid_ptr, k_scale_ptr, buffers, barriers, W, D, BLOCK_K,
                BN, STAGES, S_L, O_L, P_L, number, PINGPONG, MERGED, LAZY and not VALID,
                EMULATE and not VALID,
            )  # fmt: skip
        acc, p, peak, total, alpha, slot, phase, turn = state
        if PERSISTENT:
            mbarrier.arrive(q_empty.index(W))
        mbarrier.wait(v_ready.index(slot), phase)
        if VALID and not FP8:
            zero_from(v_smem.index(slot).reshape([BN, D]), real, BN, D)
        started = _values(p, acc, v_smem, slot, D, BN, O_L, FP8)
        product = warpgroup_mma_wait(0, [started])
        if MERGED:
            mbarrier.arrive(k_empty.index(slot))
        else:
            mbarrier.arrive(v_empty.index(slot))
        slot, phase = advance(slot, phase, STAGES)
        if FP8:
            product += acc * alpha[:, None]
        share = 1.0 / gl.where(total > 0, total, 1.0)
        out = product * gl.convert_layout(share, gl.SliceLayout(1, O_L))[:, None]
        if FP8:
            columns = gl.arange(0, D, gl.SliceLayout(0, O_L))
            out *= gl.load(v_scale_ptr + head * D + columns)[None, :]
        # The copy stops at the end of a head, so that a ragged tile overwrites nothing.
        if PERSISTENT:
            tma.store_wait(0)
            gl.thread_barrier()
        o = o_smem.index(W)
        o.reshape([ROWS, D]).store(out.to(o.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(descriptors[3], [b, h, m0 + W * ROWS, 0], o)
        rows = m0 + W * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, S_L))
        # ln(sum of exp) from log2 units; a row without keys has peak = -inf.
        lse = (peak + gl.log2(total)) * 0.6931471805599453
        if INT8:
            lse += scale * gl.load(shift_ptr + head * S + rows, mask=rows < S, other=0.0)
        gl.store(lse_ptr + head * S + rows, lse, mask=rows < S)
    tma.store_wait(0)


# Lengths and strides change from call to call; none is worth a compilation of its own.
@gluon.jit(
    do_not_specialize=(
        "idx_b", "idx_h", "idx_q", "cnt_b", "cnt_h", "cnt_q", "H", "S", "keys", "nk", "tiles",
    )
)  # fmt: skip
def hopper_forward(
    q_desc, k_desc, v_desc, o_desc, q_scale_ptr, k_scale_ptr, v_scale_ptr, shift_ptr, lse_ptr,
    idx_ptr, cnt_ptr, valid_ptr, kv_len_ptr, order_ptr,
    idx_b, idx_h, idx_q, cnt_b, cnt_h, cnt_q, H, S, keys, nk, tiles, scale,
    D: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, BN: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, PERSISTENT: gl.constexpr,
    PINGPONG: gl.constexpr, MERGED: gl.constexpr, LAZY: gl.constexpr, EMULATE: gl.constexpr,
    UNROLL: gl.constexpr,
    REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """See `block_sparse_attention`. Descriptors are 4-D. q_scale_ptr, k_scale_ptr, shift_ptr: of
    INT8 queries and keys, else None; v_scale_ptr: of e4m3 values, which lie transposed with the
    keys of each 16 in the order of `quantize_values(permuted=True)`, else None."""
    INT8: gl.constexpr = q_scale_ptr is not None
    FP8: gl.constexpr = v_scale_ptr is not None
    V_ROWS: gl.constexpr = D if FP8 else BN
    V_COLUMNS: gl.constexpr = BN if FP8 else D
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, ROWS, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BN, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(
        v_desc.dtype, [STAGES, 1, 1, V_ROWS, V_COLUMNS], v_desc.layout
    )
    if PERSISTENT or INT8:
        o_smem = gl.allocate_shared_memory(o_desc.dtype, [CONSUMERS, 1, 1, ROWS, D], o_desc.layout)
    else:
        o_smem = q_smem
    LAYOUT: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], LAYOUT)
    q_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], LAYOUT)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], LAYOUT)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], LAYOUT)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], LAYOUT)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], LAYOUT)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], LAYOUT)
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
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
                    descriptors, buffers, barriers, o_smem, scales, lists, valid_ptr, lse_ptr,
                    strides, sizes, scale, tiles, 0, D, BLOCK_Q, BLOCK_K, BN, CONSUMERS,
                    STAGES, PERSISTENT, PINGPONG, MERGED, LAZY, EMULATE, UNROLL,
                )),
                (_consume, (
                    descriptors, buffers, barriers, o_smem, scales, lists, valid_ptr, lse_ptr,
                    strides, sizes, scale, tiles, 1, D, BLOCK_Q, BLOCK_K, BN, CONSUMERS,
                    STAGES, PERSISTENT, PINGPONG, MERGED, LAZY, EMULATE, UNROLL,
                )),
                (_produce, (
                    descriptors, buffers, barriers, lists, strides, sizes, tiles, D, BLOCK_Q,
                    BLOCK_K, BN, CONSUMERS, STAGES, PERSISTENT, MERGED,
                )),
            ],
            [4, 1],
            [REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (
                    descriptors, buffers, barriers, o_smem, scales, lists, valid_ptr, lse_ptr,
                    strides, sizes, scale, tiles, 0, D, BLOCK_Q, BLOCK_K, BN, CONSUMERS,
                    STAGES, PERSISTENT, False, MERGED, LAZY, EMULATE, UNROLL,
                )),
                (_produce, (
                    descriptors, buffers, barriers, lists, strides, sizes, tiles, D, BLOCK_Q,
                    BLOCK_K, BN, CONSUMERS, STAGES, PERSISTENT, MERGED,
                )),
            ],
            [1],
            [PRODUCER_REGISTERS],
        )  # fmt: skip
