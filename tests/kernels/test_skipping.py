"""`skip_threshold`: tiles of small weights are left out, within a bound, and the map says which."""

import pytest
import torch

from tests.kernels.cases import Case, make
from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.block_sparse import block_sparse_attention, explain, skipping_attention
from vdit_sparse.kernels.block_sparse.reference import forward as reference_forward

BACKENDS = ("reference", "triton", "hopper")
# Rows without keys have the logarithm of zero; the interpreter lets NumPy remark on it.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
CASES = {
    "whole": Case(S=256, block=64),
    "one query in the last block": Case(S=193, block=64),
    "ragged keys": Case(S=128, keys=250, block=64),
    "empty and full rows": Case(S=256, block=64, rows="empty"),
    "all rows full": Case(S=256, block=64, rows="all"),
    "padded keys": Case(S=256, block=64, B=2, kv_len=(100, 255)),
    "masked slots": Case(S=256, block=64, valid=True),
    "blocks of 128": Case(S=384, block=128, rows="full"),
}
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def problem(case: Case, backend: str, device):
    """Queries that look one way, and blocks of keys that lie more or less there; or a skip."""
    q, k, v, mask, kv_len = make(case, device)
    direction = torch.randn(64).to(device)
    strength = torch.linspace(-3, 3, mask.nk, device=device)
    # The strongest block in the middle: lists are walked from their start or from their end, and
    # nothing is left out where each block is stronger than those before.
    strength[[mask.nk // 2, -1]] = strength[[-1, mask.nk // 2]]
    strength = strength.repeat_interleave(mask.block_k)[: k.shape[2], None]
    q, k = 0.2 * q + direction, 0.2 * k + strength * direction
    # In two bytes Triton's tile of D = 64 is 64 x 64, a block.
    dtype = {"reference": q.dtype, "triton": torch.float16, "hopper": torch.bfloat16}[backend]
    q, k, v = (x.to(dtype) for x in (q, k, v))
    reason = explain(q, k, v, mask)[backend]
    if reason is not None:
        assert "self-check failed" not in reason, reason
        pytest.skip(reason)
    return q, k, v, mask, kv_len


def exact(q, k, v, mask, kv_len):
    tensors = (x.double() for x in (q, k, v))
    return reference_forward(*tensors, mask, 0.125, kv_len, compute=torch.float64)


@each_backend
@each_case
@pytest.mark.parametrize("threshold", [1.0, 1e-2, 1e-5])
def test_the_bound_holds(threshold, case, backend, device):
    q, k, v, mask, kv_len = problem(case, backend, device)
    out, lse, skipped = skipping_attention(q, k, v, mask, threshold, kv_len=kv_len, backend=backend)
    everything, everything_lse = exact(q, k, v, mask, kv_len)
    tokens = mask.block_k * mask.keep().sum(-1).repeat_interleave(mask.block_q, -1)
    if backend != "hopper" and mask.block_k == 64:
        # There a tile is a block, and the map tells all that was left out.
        tokens = mask.block_k * skipped.sum(-1).repeat_interleave(mask.block_q, -1)
    loss = threshold * tokens[..., : case.S].expand(lse.shape)
    # Weights are as exact as scores, which are as large as lse.
    size = max(1.0, float(everything_lse[everything_lse.isfinite()].abs().max()))
    rounding = 4 * torch.finfo(q.dtype).eps + 4 * torch.finfo(torch.float32).eps * size
    assert not skipped[(~mask.keep()).expand(skipped.shape)].any()
    largest = v[v.isfinite()].abs().max()
    assert ((out - everything).abs() <= (2 * loss[..., None] + rounding) * largest).all()
    empty = everything_lse.isinf()
    assert torch.equal(lse.isinf(), empty)
    fall = (everything_lse - lse)[~empty]
    assert (fall <= loss[~empty] + 1e-4).all() and (fall >= -1e-4).all()


@each_backend
@each_case
def test_the_map_is_a_mask_for_what_was_computed(case, backend, device):
    q, k, v, mask, kv_len = problem(case, backend, device)
    out, lse, skipped = skipping_attention(q, k, v, mask, 1e-2, kv_len=kv_len, backend=backend)
    assert skipped.dtype == torch.bool and skipped.shape[2:] == (mask.nq, mask.nk)
    if case.kv_len is None:
        assert skipped.any()
    if mask.block_k == 128 and backend != "reference":
        return  # a part of a block may be left out
    left = mask.keep() & ~skipped
    left = BlockMask.from_keep(left, (mask.block_q, mask.block_k), valid=mask.valid)
    expected, expected_lse = block_sparse_attention(q, k, v, left, kv_len=kv_len, backend=backend)
    size = 4 * torch.finfo(q.dtype).eps
    torch.testing.assert_close(out, expected, atol=size, rtol=size)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)


@each_backend
def test_queries_past_the_end_have_no_say(backend, device):
    q, k, v, mask, _ = problem(Case(S=129, rows="all", block=64), backend, device)
    for D in (q, k):
        D[:] = 0
    q[..., 0] = 8
    k[:, :, 64:128, 0] = -8  # below, for every real query; a query of zeros has 0 everywhere
    _, _, skipped = skipping_attention(q, k, v, mask, 0.5, backend=backend)
    assert skipped[:, :, :, 1].all() and not skipped[:, :, :, 0].any()


@each_backend
def test_a_larger_threshold_leaves_out_more(backend, device):
    q, k, v, mask, _ = problem(Case(S=512, block=64, rows="all"), backend, device)
    maps = [
        skipping_attention(q, k, v, mask, threshold, backend=backend)[2]
        for threshold in (1e-30, 1e-6, 1e-3, 1.0)
    ]
    assert not maps[0].any() and maps[1].sum() < maps[3].sum()
    for fewer, more in zip(maps[:-1], maps[1:], strict=True):
        assert not (fewer & ~more).any()


@each_backend
def test_a_tiny_threshold_is_none(backend, device):
    q, k, v, mask, kv_len = problem(CASES["empty and full rows"], backend, device)
    got = block_sparse_attention(q, k, v, mask, skip_threshold=1e-37, backend=backend)
    expected = block_sparse_attention(q, k, v, mask, backend=backend)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_wrong_calls_are_refused():
    q, k, v, mask, _ = make(Case(S=64, block=64), torch.device("cpu"))
    for threshold in (0.0, 1.5, -1.0):
        with pytest.raises(ValueError, match="above 0 and at most 1, got"):
            skipping_attention(q, k, v, mask, threshold)
    with pytest.raises(ValueError, match="precision='bf16', got 'int8_bf16': leave one out"):
        block_sparse_attention(q, k, v, mask, skip_threshold=0.1, precision="int8_bf16")
    with pytest.raises(ValueError, match="'gather' computes every listed block: leave skip_thresh"):
        skipping_attention(q, k, v, mask, 0.1, backend="gather")
    with pytest.raises(ValueError, match="backend must be one of"):
        skipping_attention(q, k, v, mask, 0.1, backend="cutlass")


@each_backend
def test_operator_contract(backend, device):
    q, k, v, mask, kv_len = problem(Case(S=128, block=64, kv_len=(100,)), backend, device)
    operator = torch.ops.vdit_sparse.skipping_attention.default
    blocks = [mask.nk, 64, 64]
    torch.library.opcheck(
        operator, (q, k, v, mask.idx, mask.cnt, None, kv_len, blocks, 0.125, 0.1, backend)
    )
