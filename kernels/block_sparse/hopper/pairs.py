"""Query blocks of 64 in pairs: two consumers with a list each share the key blocks that both list.

The producer loads the union of two neighbouring rows' lists, from its end; a consumer whose list
lacks a block lets it pass. Neighbouring rows of a video list much the same blocks, which are then
read from L2 once and not twice. The numbers are those of `kernel.py`, whose structure this shares:
scores of one block in flight with the values of the last. A consumer that lets blocks pass keeps
the last values until their place in the ring is wanted, and multiplies them then. Key blocks are
not split: BLOCK_K is a step. A place in a ring is `slot` and the parity `phase` of its barriers.
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
    advance,
    block_at,
    list_of,
    masked,
    peak_of,
    place_of,
    weights_of,
    zero_from,
)
from vdit_sparse.kernels.block_sparse.hopper.steps import (
    start_scores,
    start_values,
    store_outputs,
)


@gluon.jit
def _entry(half):
    """The block at a half's place in its list; -1 before its start."""
    list_ptr, full, position = half
    return gl.where(position < 0, -1, block_at(list_ptr, position, full))


@gluon.jit
def _back(half, by):
    """The same list, `by` places nearer to its start."""
    list_ptr, full, position = half
    return list_ptr, full, position - by.to(gl.int32)


@gluon.jit
def _halves(t, lists, strides, sizes, BLOCK_K: gl.constexpr):
    """Batch row, head and first query of the pair, real keys, and the end of each half's list; past
    the last query block it is empty."""
    b, h, m0, length = place_of(t, lists[3], lists[2], sizes, 2 * ROWS)
    nq = (sizes[1] + ROWS - 1) // ROWS
    row = m0 // ROWS
    first_ptr, first_n, first_full = list_of(b, h, row, lists, strides, sizes[3], length, BLOCK_K)
    second_ptr, second_n, second_full = list_of(
        b, h, gl.minimum(row + 1, nq - 1), lists, strides, sizes[3], length, BLOCK_K
    )
    second_n = gl.where(row + 1 < nq, second_n, 0)
    first = first_ptr, first_full, first_n - 1
    second = second_ptr, second_full, second_n - 1
    return b, h, m0, length, first, second


@gluon.jit
def _produce(
    descriptors, buffers, barriers, lists, strides, sizes,
    D: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Queries of both halves, then the keys and values of all blocks that one of them lists."""
    q_desc, k_desc, v_desc, _ = descriptors
    q_smem, k_smem, v_smem = buffers
    q_ready, k_ready, k_empty, v_ready, v_empty = barriers
    b, h, m0, _length, first, second = _halves(gl.program_id(0), lists, strides, sizes, BLOCK_K)
    for w in gl.static_range(2):
        mbarrier.expect(q_ready.index(w), ROWS * D * 2)
        tma.async_copy_global_to_shared(
            q_desc, [b, h, m0 + w * ROWS, 0], q_ready.index(w), q_smem.index(w)
        )
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    one, other = _entry(first), _entry(second)
    while gl.maximum(one, other) >= 0:
        start = gl.maximum(one, other) * BLOCK_K
        mbarrier.wait(k_empty.index(slot), phase ^ 1)
        mbarrier.expect(k_ready.index(slot), BLOCK_K * D * 2)
        tma.async_copy_global_to_shared(
            k_desc, [b, h, start, 0], k_ready.index(slot), k_smem.index(slot)
        )
        mbarrier.wait(v_empty.index(slot), phase ^ 1)
        mbarrier.expect(v_ready.index(slot), BLOCK_K * D * 2)
        tma.async_copy_global_to_shared(
            v_desc, [b, h, start, 0], v_ready.index(slot), v_smem.index(slot)
        )
        slot, phase = advance(slot, phase, STAGES)
        first, second = _back(first, one >= other), _back(second, other >= one)
        one, other = _entry(first), _entry(second)


@gluon.jit
def _values(p, acc, buffers, barriers, slot, phase, D: gl.constexpr, BLOCK_K: gl.constexpr,
            O_L: gl.constexpr):  # fmt: skip
    """The accumulator with the weights times the values of this place, which is free then."""
    mbarrier.wait(barriers[3].index(slot), phase)
    started = start_values(p, acc, buffers[2], slot, D, BLOCK_K, O_L, False)
    acc = warpgroup_mma_wait(0, [started])
    mbarrier.arrive(barriers[4].index(slot))
    return acc


@gluon.jit
def _softmax(scores, peak, total, factor, P_L: gl.constexpr, number: gl.constexpr):
    """Weights, maximum and sum after these scores, and by what the accumulator shrinks."""
    peak_new = gl.maximum(peak, peak_of(scores, factor, False, False))
    p, sums, _, _ = weights_of(scores, factor, peak_new, P_L, number, False, False, False)
    alpha = gl.exp2(peak - peak_new)
    return p, peak_new, total * alpha + sums, alpha


@gluon.jit
def _mine(
    state, q, buffers, barriers, slot, phase, factor, D: gl.constexpr, BLOCK_K: gl.constexpr,
    S_L: gl.constexpr, O_L: gl.constexpr, P_L: gl.constexpr, number: gl.constexpr,
):  # fmt: skip
    """Scores and weights of the block at this place, and the values of the last one if they are
    still to be multiplied."""
    acc, p, peak, total, kept, kept_slot, kept_phase = state
    _q_smem, k_smem, v_smem = buffers
    _q_ready, k_ready, k_empty, v_ready, v_empty = barriers
    if kept:
        scores_started = start_scores(q, k_smem, k_ready, slot, phase, D, BLOCK_K, S_L, False)
        mbarrier.wait(v_ready.index(kept_slot), kept_phase)
        values_started = start_values(p, acc, v_smem, kept_slot, D, BLOCK_K, O_L, False)
        scores = warpgroup_mma_wait(1, [scores_started])
        mbarrier.arrive(k_empty.index(slot))
        p, peak, total, alpha = _softmax(scores, peak, total, factor, P_L, number)
        alpha = gl.convert_layout(alpha, gl.SliceLayout(1, O_L))
        acc = warpgroup_mma_wait(0, [values_started])
        mbarrier.arrive(v_empty.index(kept_slot))
        acc = acc * alpha[:, None]
    else:
        scores_started = start_scores(q, k_smem, k_ready, slot, phase, D, BLOCK_K, S_L, False)
        scores = warpgroup_mma_wait(0, [scores_started])
        mbarrier.arrive(k_empty.index(slot))
        p, peak, total, alpha = _softmax(scores, peak, total, factor, P_L, number)
        alpha = gl.convert_layout(alpha, gl.SliceLayout(1, O_L))
        acc = acc * alpha[:, None]
    return acc, p, peak, total, kept | 1, slot, phase


@gluon.jit
def _pass(
    state, buffers, barriers, slot, phase, D: gl.constexpr, BLOCK_K: gl.constexpr,
    O_L: gl.constexpr,
):  # fmt: skip
    """Lets the block at this place go, after the kept values if they lie where its own come."""
    acc, p, peak, total, kept, kept_slot, kept_phase = state
    _q_ready, k_ready, k_empty, v_ready, v_empty = barriers
    # An arrival counts for this turn of the ring only after its copy.
    mbarrier.wait(k_ready.index(slot), phase)
    mbarrier.arrive(k_empty.index(slot))
    if (kept != 0) & (kept_slot == slot):
        acc = _values(p, acc, buffers, barriers, kept_slot, kept_phase, D, BLOCK_K, O_L)
        kept = kept ^ 1
    mbarrier.wait(v_ready.index(slot), phase)
    mbarrier.arrive(v_empty.index(slot))
    return acc, p, peak, total, kept, kept_slot, kept_phase


@gluon.jit
def _consume(
    descriptors, buffers, barriers, lse_ptr, lists, strides, sizes, scale,
    W: gl.constexpr, D: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Attention of one half's 64 queries."""
    S_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    O_L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_L: gl.constexpr = gl.DotOperandLayout(0, O_L, 2)
    number: gl.constexpr = descriptors[2].dtype
    q_smem, k_smem, v_smem = buffers
    q_ready, k_ready, k_empty, v_ready, _v_empty = barriers
    H, S, _keys, _nk = sizes
    b, h, m0, length, first, second = _halves(gl.program_id(0), lists, strides, sizes, BLOCK_K)
    if W == 0:
        mine, theirs = first, second
    else:
        mine, theirs = second, first
    factor = scale * 1.4426950408889634
    one, other = _entry(mine), _entry(theirs)
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    acc = gl.zeros([ROWS, D], gl.float32, O_L)
    p = gl.zeros([ROWS, BLOCK_K], number, P_L)
    peak = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S_L))
    total = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, S_L))
    kept = gl.to_tensor(0)
    state = acc, p, peak, total, kept, slot, phase
    mbarrier.wait(q_ready.index(W), 0)
    q = q_smem.index(W).reshape([ROWS, D])
    while other > one:
        state = _pass(state, buffers, barriers, slot, phase, D, BLOCK_K, O_L)
        slot, phase = advance(slot, phase, STAGES)
        theirs = _back(theirs, other > one)
        other = _entry(theirs)
    if one >= 0:
        # The last block may straddle the end of the keys.
        real = gl.minimum(length - one * BLOCK_K, BLOCK_K)
        started = start_scores(q, k_smem, k_ready, slot, phase, D, BLOCK_K, S_L, False)
        scores = masked(warpgroup_mma_wait(0, [started]), real, S_L, BLOCK_K)
        mbarrier.arrive(k_empty.index(slot))
        if real < BLOCK_K:
            mbarrier.wait(v_ready.index(slot), phase)
            zero_from(v_smem.index(slot).reshape([BLOCK_K, D]), real, BLOCK_K, D)
        acc, p, peak, total, kept, kept_slot, kept_phase = state
        p, peak, total, _alpha = _softmax(scores, peak, total, factor, P_L, number)
        state = acc, p, peak, total, kept | 1, slot, phase
        slot, phase = advance(slot, phase, STAGES)
        mine, theirs = _back(mine, one >= other), _back(theirs, other >= one)
        one, other = _entry(mine), _entry(theirs)
        while gl.maximum(one, other) >= 0:
            # The lists are read while products are in flight.
            mine, theirs = _back(mine, one >= other), _back(theirs, other >= one)
            one_next, other_next = _entry(mine), _entry(theirs)
            if one >= other:
                state = _mine(
                    state, q, buffers, barriers, slot, phase, factor, D, BLOCK_K, S_L, O_L, P_L,
                    number,
                )  # fmt: skip
            else:
                state = _pass(state, buffers, barriers, slot, phase, D, BLOCK_K, O_L)
            slot, phase = advance(slot, phase, STAGES)
            one, other = one_next, other_next
        acc, p, peak, total, kept, kept_slot, kept_phase = state
        if kept:
            acc = _values(p, acc, buffers, barriers, kept_slot, kept_phase, D, BLOCK_K, O_L)
        state = acc, p, peak, total, kept, kept_slot, kept_phase
    acc, p, peak, total, kept, kept_slot, kept_phase = state
    share = 1.0 / gl.where(total > 0, total, 1.0)
    out = acc * gl.convert_layout(share, gl.SliceLayout(1, O_L))[:, None]
    lse = (peak + gl.log2(total)) * 0.6931471805599453
    head = (b * H + h).to(gl.int64)
    store_outputs(
        out, lse, q_smem, descriptors[3], lse_ptr, b, h, m0, head * S, S, W, D, S_L, False
    )  # fmt: skip
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=("idx_b", "idx_h", "idx_q", "cnt_b", "cnt_h", "cnt_q", "H", "S", "keys", "nk")
)
def paired_forward(
    q_desc, k_desc, v_desc, o_desc, lse_ptr, idx_ptr, cnt_ptr, kv_len_ptr, order_ptr,
    idx_b, idx_h, idx_q, cnt_b, cnt_h, cnt_q, H, S, keys, nk, scale,
    D: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """See `block_sparse_attention`, for lists of 64 queries; a program has two of them. Descriptors
    are 4-D."""
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 1, ROWS, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BLOCK_K, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, BLOCK_K, D], v_desc.layout)
    LAYOUT: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], LAYOUT)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], LAYOUT)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], LAYOUT)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], LAYOUT)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], LAYOUT)
    for i in gl.static_range(2):
        mbarrier.init(q_ready.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    descriptors = q_desc, k_desc, v_desc, o_desc
    buffers = q_smem, k_smem, v_smem
    barriers = q_ready, k_ready, k_empty, v_ready, v_empty
    lists = idx_ptr, cnt_ptr, kv_len_ptr, order_ptr
    strides = idx_b, idx_h, idx_q, cnt_b, cnt_h, cnt_q
    sizes = H, S, keys, nk
    gl.warp_specialize(
        [
            (_consume, (
                descriptors, buffers, barriers, lse_ptr, lists, strides, sizes, scale, 0, D,
                BLOCK_K, STAGES,
            )),
            (_consume, (
                descriptors, buffers, barriers, lse_ptr, lists, strides, sizes, scale, 1, D,
                BLOCK_K, STAGES,
            )),
            (_produce, (
                descriptors, buffers, barriers, lists, strides, sizes, D, BLOCK_K, STAGES,
            )),
        ],
        [4, 1],
        [REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
