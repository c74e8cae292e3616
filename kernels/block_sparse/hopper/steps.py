"""Steps of a consumer of the Hopper kernel: scores, weights and values of BN keys."""

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
    ROWS,
    SMALLEST,
    advance,
    key_place,
    masked,
    operand_of,
    peak_of,
    real_in_step,
    rescaled,
    scores_of,
    step_at,
    weights_of,
    words_of,
    zero_from,
)


@gluon.jit
def start_scores(q, k_smem, k_ready, slot, phase, D: gl.constexpr, BN: gl.constexpr,
            S_L: gl.constexpr, INT8: gl.constexpr):  # fmt: skip
    """Starts the products of the queries and the keys of this slot."""
    kind: gl.constexpr = gl.int32 if INT8 else gl.float32
    zero = gl.zeros([ROWS, BN], kind, S_L)
    mbarrier.wait(k_ready.index(slot), phase)
    k = k_smem.index(slot).reshape([BN, D]).permute((1, 0))
    return warpgroup_mma(q, k, zero, use_acc=False, is_async=True)


@gluon.jit
def start_values(p, acc, v_smem, slot, D: gl.constexpr, BN: gl.constexpr,
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
def step(
    i, state, real_last, q, row, valid_ptr, k_scale_ptr, buffers, barriers,
    W: gl.constexpr, D: gl.constexpr, BLOCK_K: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, S_L: gl.constexpr, O_L: gl.constexpr, P_L: gl.constexpr,
    number: gl.constexpr, PINGPONG: gl.constexpr, LANDMARK: gl.constexpr,
):  # fmt: skip
    """Scores and weights of step `i`, values of the one before, of whose keys `real_last` are real;
    the new state, and how many keys of this step are real."""
    acc, p, peak, total, alpha, slot, phase, turn, key_scale, block = state
    list_ptr, steps, full, length, to_log2, k_row = row
    _q_smem, k_smem, v_smem = buffers
    _q_ready, _q_empty, k_ready, k_empty, v_ready, v_empty, turns = barriers
    VALID: gl.constexpr = valid_ptr is not None
    INT8: gl.constexpr = k_smem.dtype == gl.int8
    FP8: gl.constexpr = number == gl.float8e4nv
    real = real_last
    factor = to_log2
    if VALID:
        here, start = step_at(list_ptr, steps - 1 - i, full, BLOCK_K, BN)
        real = real_in_step(here, start, steps, length, valid_ptr, BLOCK_K, BN)
    if INT8:
        factor = gl.maximum(to_log2 * key_scale, SMALLEST)
        # A step early: products would wait for the one load, and that for the other.
        key_scale = gl.load(k_scale_ptr + k_row + block)
        block, _start = step_at(list_ptr, steps - 3 - i, full, BLOCK_K, BN)
    last, last_phase = slot, phase
    slot, phase = advance(slot, phase, STAGES)
    if VALID:
        mbarrier.wait(v_ready.index(last), last_phase)
        if not FP8:
            zero_from(v_smem.index(last).reshape([BN, D]), real_last, BN, D)
    if PINGPONG:
        mbarrier.wait(turns.index(W), turn ^ (1 - W))
    if FP8:
        p = operand_of(p, P_L)
    k_slot, k_phase = key_place(slot, phase, k_smem.shape[0] != v_smem.shape[0])
    scores_started = start_scores(q, k_smem, k_ready, k_slot, k_phase, D, BN, S_L, INT8)
    if not VALID:
        mbarrier.wait(v_ready.index(last), last_phase)
    values_started = start_values(p, acc, v_smem, last, D, BN, O_L, FP8)
    if PINGPONG:
        mbarrier.arrive(turns.index(1 - W))
        turn ^= 1
    scores = warpgroup_mma_wait(1, [scores_started])
    mbarrier.arrive(k_empty.index(k_slot))
    if VALID:
        scores = masked(scores_of(scores), real, S_L, BN)
    peak_new = gl.maximum(peak, peak_of(scores, factor, S_L, INT8, FP8))
    p, sums, peak_new, shift = weights_of(
        scores, factor, peak_new, P_L, number, INT8, LANDMARK, VALID
    )
    alpha_new = gl.exp2(peak - shift)
    total = rescaled(total, alpha_new) + sums
    alpha_new = gl.convert_layout(alpha_new, gl.SliceLayout(1, O_L))
    product = warpgroup_mma_wait(0, [values_started])
    mbarrier.arrive(v_empty.index(last))
    if FP8:
        p = words_of(p)
        acc = acc * alpha[:, None] + product
    else:
        acc = product * alpha_new[:, None]
    return (acc, p, peak_new, total, alpha_new, slot, phase, turn, key_scale, block), real


@gluon.jit
def step_or_skip(
    i, state, q, row, valid_ptr, skips_ptr, skip_log2, buffers, barriers, outside,
    D: gl.constexpr, BLOCK_K: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    S_L: gl.constexpr, O_L: gl.constexpr, P_L: gl.constexpr, number: gl.constexpr,
):  # fmt: skip
    """Step `i` from its scores to its values, without those in flight; or only its scores, if all
    are below the maxima by `skip_log2`. outside: queries past the end."""
    acc, peak, total, slot, phase = state
    list_ptr, steps, full, length, factor, skips_row = row
    _q_smem, k_smem, v_smem = buffers
    _q_ready, _q_empty, k_ready, k_empty, v_ready, v_empty, _turns = barriers
    VALID: gl.constexpr = valid_ptr is not None
    block, start = step_at(list_ptr, steps - 1 - i, full, BLOCK_K, BN)
    real = real_in_step(block, start, steps, length, valid_ptr, BLOCK_K, BN)
    k_slot, k_phase = key_place(slot, phase, k_smem.shape[0] != v_smem.shape[0])
    started = start_scores(q, k_smem, k_ready, k_slot, k_phase, D, BN, S_L, False)
    scores = warpgroup_mma_wait(0, [started])
    mbarrier.arrive(k_empty.index(k_slot))
    if VALID:
        scores = masked(scores, real, S_L, BN)
    top = peak_of(scores, factor, S_L, False, False)
    small = (top < peak + skip_log2) | outside
    skip = gl.min(small.to(gl.int32), 0) == 1
    mbarrier.wait(v_ready.index(slot), phase)
    if skip:
        gl.atomic_add(skips_ptr + skips_row + block, 1)
    else:
        peak_new = gl.maximum(peak, top)
        p, sums, peak_new, shift = weights_of(
            scores, factor, peak_new, P_L, number, False, False, VALID
        )
        alpha = gl.exp2(peak - shift)
        total = rescaled(total, alpha) + sums
        peak = peak_new
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_L))[:, None]
        if VALID:
            zero_from(v_smem.index(slot).reshape([BN, D]), real, BN, D)
        products = start_values(p, acc, v_smem, slot, D, BN, O_L, False)
        acc = warpgroup_mma_wait(0, [products])
    mbarrier.arrive(v_empty.index(slot))
    slot, phase = advance(slot, phase, STAGES)
    return acc, peak, total, slot, phase


@gluon.jit
def store_outputs(
    out, lse, o_smem, o_desc, lse_ptr, b, h, m0, head_rows, S, W: gl.constexpr, D: gl.constexpr,
    S_L: gl.constexpr, PERSISTENT: gl.constexpr,
):  # fmt: skip
    """Outputs and logarithms of this consumer's queries; a copy stops at the end of a head, so that
    a ragged tile overwrites nothing."""
    if PERSISTENT:
        tma.store_wait(0)
        gl.thread_barrier()
    o = o_smem.index(W)
    o.reshape([ROWS, D]).store(out.to(o.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(o_desc, [b, h, m0 + W * ROWS, 0], o)
    rows = m0 + W * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, S_L))
    gl.store(lse_ptr + head_rows + rows, lse, mask=rows < S)
