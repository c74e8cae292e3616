"""The Hopper backend: its kernel against float64 on an H100 or H200, elsewhere what surrounds it.

tests/kernels/test_block_sparse.py runs over all backends, this one included.
"""

from dataclasses import replace

import pytest
import torch

from tests.kernels.cases import CASES, Case, make
from tests.kernels.tolerance import assert_attention
from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.block_sparse import BACKENDS, block_sparse_attention, explain, hopper
from vdit_sparse.kernels.block_sparse.hopper.variants import Variant, variant_for
from vdit_sparse.kernels.block_sparse.reference import forward as reference_forward
from vdit_sparse.kernels.quant import quantize_values

pytest_plugins = ["tests.kernels.float8"]
BLOCKS = [(128, 128), (128, 64), (64, 128), (64, 64)]
PRECISIONS = ("bf16", "int8_bf16", "int8_fp8")
LONG = {
    "long": Case(S=1000, D=128, block=128),
    "long, lists of 64 queries": Case(S=1000, D=128, block=(64, 128)),
    "long, empty and full rows": Case(S=777, D=128, block=64, rows="empty", B=2, lists="batch"),
    "long, padded": Case(S=1000, D=128, B=3, lists="batch", kv_len=(0, 129, 999)),
    "long, padded full rows": Case(S=1000, D=128, B=3, rows="all", kv_len=(0, 129, 999)),
    "long, padded halves": Case(S=1000, D=128, B=3, block=(64, 128), kv_len=(64, 129, 193)),
    "long, masked slots": Case(S=1000, D=128, valid=True, block=(64, 128), kv_len=(900,)),
    "long, shared lists": Case(S=1000, D=64, B=2, lists="shared", block=(128, 64)),
}
GEOMETRIES = {
    name: case
    for name, case in (CASES | LONG).items()
    if case.dtype == torch.float32 and case.D in (64, 128)
}
CHANGES = ("persistent", "pingpong", "landmark", "longest_first")


def hopper_or_skip(q, k, v, mask, precision="bf16"):
    """Skips with the backend's own reason, and fails where that is a failed self-check."""
    reason = explain(q, k, v, mask, precision)["hopper"]
    if reason is not None:
        assert "self-check failed" not in reason, reason
        pytest.skip(reason)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("case", GEOMETRIES.values(), ids=GEOMETRIES)
def test_matches_float64(case, D, device, poisoned):
    q, k, v, mask, kv_len = make(replace(case, D=D, dtype=torch.bfloat16), device)
    hopper_or_skip(q, k, v, mask)
    result = block_sparse_attention(q, k, v, mask, kv_len=kv_len, backend="hopper")
    assert_attention(result, q, k, v, mask, kv_len)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("garbage", [torch.inf, torch.nan])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize(("valid", "kv_len"), [(True, (77, 0)), (False, (77, 130)), (True, None)])
def test_padding_may_hold_anything(valid, kv_len, block, garbage, D, device):
    """That is: it changes nothing. Keys are masked by their index, values zeroed in shared memory,
    the queries' own end is not written."""
    case = Case(B=2, S=140, D=D, block=block, valid=valid, kv_len=kv_len, dtype=torch.bfloat16)
    q, k, v, mask, kv_len = make(case, device)
    hopper_or_skip(q, k, v, mask)
    expected = block_sparse_attention(q, k, v, mask, kv_len=kv_len, backend="hopper")
    slots = torch.arange(140, device=device)
    real = (slots < 140)[None].expand(2, -1)
    if kv_len is not None:
        real = real & (slots < kv_len[:, None])
    if mask.valid is not None:
        real = real & (slots % block[1] < mask.valid[slots // block[1]])
    for x in (k, v):
        x.masked_fill_(~real[:, None, :, None], garbage)
    got = block_sparse_attention(q, k, v, mask, kv_len=kv_len, backend="hopper")
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


def many_tiles(device, block, D):
    """More tiles than a GPU runs at once, so that persistent programs take several; lists whose
    lengths differ by sixteen times."""
    q, k, v = (
        torch.randn(1, 640, 60, D, dtype=torch.bfloat16, device=device).transpose(1, 2)
        for _ in range(3)
    )
    blocks = -(-640 // block)
    share = torch.linspace(0.05, 1, blocks)[torch.randperm(blocks)]
    keep = torch.rand(60, blocks, blocks) < share[:, None]
    return q, k, v, BlockMask.from_keep(keep, block).to(device)


@pytest.mark.parametrize(("block", "D"), [(128, 128), (128, 64), (64, 128)])
@pytest.mark.parametrize("change", [None, *CHANGES, "steps of 64"])
def test_every_form_is_right(change, block, D, device):
    from vdit_sparse.kernels.block_sparse.hopper.launch import launch

    q, k, v, mask = many_tiles(device, block, D)
    hopper_or_skip(q, k, v, mask)
    variant = variant_for(D, (block, block))
    if change == "steps of 64":
        variant = replace(variant, keys=64, stages=4 if block == 128 else 3)
    elif change is not None:
        variant = replace(variant, **{change: True})
    assert_attention(launch(q, k, v, mask, D**-0.5, None, "bf16", variant), q, k, v, mask)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("keys", [64, 128])
def test_one_tile_of_keys_for_two_of_values(keys, D, device):
    """Neighbouring rows whose lists share all, some and no blocks."""
    from vdit_sparse.kernels.block_sparse.hopper.launch import launch

    q, k, v, _ = many_tiles(device, 64, D)
    keep = torch.rand(60, 10, 640 // keys) < torch.rand(60, 10, 1)
    keep[:30, ::2] = keep[:30, 1::2]
    mask = BlockMask.from_keep(keep, (64, keys)).to(device)
    hopper_or_skip(q, k, v, mask)
    variant = Variant(1, keys, 2, lone=True, registers=128)
    for S in (640, 630, 570):
        short = [x[:, :, :S] for x in (q, k, v)]
        part = BlockMask.from_keep(mask.keep()[:, :, : -(-S // 64), : -(-S // keys)], (64, keys))
        assert_attention(launch(*short, part, D**-0.5, None, "bf16", variant), *short, part)


@pytest.mark.parametrize("scale", [4.0, 30.0])
def test_large_scores_do_not_overflow(scale, device):
    """Maxima that grow in every block."""
    from vdit_sparse.kernels.block_sparse.hopper.launch import launch

    q, k, v, mask, _ = make(Case(S=512, D=128, rows="all", dtype=torch.bfloat16), device)
    hopper_or_skip(q, k, v, mask)
    q[..., 0], k[..., 0] = scale, torch.linspace(scale, -scale, 512, device=device)
    variant = variant_for(128, (128, 128))
    assert_attention(launch(q, k, v, mask, 128**-0.5, None, "bf16", variant), q, k, v, mask)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("name", ["ragged", "blocks of 64", "row without blocks", *LONG])
@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_8_bits_are_the_reference(precision, name, D, device):
    case = replace((CASES | LONG)[name], D=D, dtype=torch.bfloat16)
    q, k, v, mask, kv_len = make(case, device)
    hopper_or_skip(q, k, v, mask, precision)
    scale = D**-0.5
    expected, expected_lse = reference_forward(q, k, v, mask, scale, kv_len, precision)
    exact, exact_lse = reference_forward(
        *(x.double() for x in (q, k, v)), mask, scale, kv_len, compute=torch.float64
    )
    out, lse = block_sparse_attention(
        q, k, v, mask, kv_len=kv_len, precision=precision, backend="hopper"
    )
    empty = exact_lse.isinf()
    assert torch.equal(lse.isinf(), empty) and not out[empty].any()
    torch.testing.assert_close(lse[~empty], expected_lse[~empty], rtol=1e-4, atol=1e-4)
    errors = [float((x.double() - exact).norm() / exact.norm()) for x in (out, expected)]
    assert errors[0] <= 1.1 * errors[1]
    assert errors[0] <= {"int8_bf16": 1.6e-2, "int8_fp8": 4.5e-2}[precision]


@pytest.mark.parametrize("change", ["persistent", "pingpong", "landmark"])
def test_forms_of_8_bits(change, device):
    from vdit_sparse.kernels.block_sparse.hopper.launch import launch

    q, k, v, mask = many_tiles(device, 128, 128)
    hopper_or_skip(q, k, v, mask, "int8_fp8")
    variant = variant_for(128, (128, 128), "int8_fp8")
    plain, form = (
        launch(q, k, v, mask, 128**-0.5, None, "int8_fp8", each)
        for each in (variant, replace(Variant(2, 128, 3), **{change: True}))
    )
    for ours, theirs in zip(form, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_permuted_values_lie_as_a_thread_has_its_scores(backend, device, float8):
    v = torch.randn(1, 2, 90, 32, device=device)
    plain = quantize_values(v, 32, backend="reference").values.float()
    got = quantize_values(v, 32, permuted=True, backend=backend).values.float()
    # Where a Hopper thread t of four has columns 2t and 2t + 1 of each 8, it gets four neighbours.
    order = [8 * j + 2 * t + e for t in range(4) for j in range(2) for e in range(2)]
    columns = torch.tensor([16 * g + i for g in range(6) for i in order], device=device)
    assert torch.equal(got, plain[..., columns])


def test_it_says_why_not():
    assert hopper.why_not_here("sm_100", "3.6.0").endswith("9.0 (Hopper), this is sm_100") or (
        "interpreter" in hopper.why_not_here("sm_100", "3.6.0")
    )
    q = torch.zeros(1, 1, 64, 96, dtype=torch.bfloat16)
    assert "got 96 in torch.bfloat16" in hopper.why_not_these(q, q, q, "bf16")
    q = torch.zeros(1, 1, 64, 64)
    assert "got 64 in torch.float32" in hopper.why_not_these(q, q, q, "bf16")
    mask = BlockMask.full(64)
    if not torch.cuda.is_available():
        assert "compute capability 9.0" in explain(q, q, q, mask)["hopper"]
        with pytest.raises(ValueError, match="'hopper' does not take this call: it needs NVIDIA"):
            block_sparse_attention(q, q, q, mask, backend="hopper")


@pytest.mark.parametrize(("version", "fine"), [("3.6.0", True), ("3.6.1", True), ("3.7.1", False)])
def test_only_tested_versions_of_triton_run(version, fine, monkeypatch):
    monkeypatch.setattr(hopper, "INTERPRETED", False)
    reason = hopper.why_not_here("sm_90", version)
    assert (reason is None) == fine
    assert fine or reason == "it was tested with Triton 3.6, this is 3.7.1"


def test_it_is_preferred():
    assert next(iter(BACKENDS)) == "hopper"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_forms_fit_their_blocks(blocks, precision):
    for D in (64, 128):
        for valid in (False, True):
            variant = variant_for(D, blocks, precision, valid)
            assert variant.rows == blocks[0] and blocks[1] % variant.keys == 0
            assert set(variant.constants) >= {"BN", "CONSUMERS", "STAGES"}
    assert Variant(1, 64, 3).programs == 2


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_the_self_check_passes_what_is_right_and_only_that(blocks, precision):
    from vdit_sparse.kernels.block_sparse.hopper.self_check import problem, why_wrong

    cpu = torch.device("cpu")
    before = torch.get_rng_state()
    q, k, v, mask = problem(cpu, torch.bfloat16, 64, blocks, valid=True)
    assert torch.equal(torch.get_rng_state(), before)
    exact = reference_forward(*(x.float() for x in (q, k, v)), mask, 0.125)
    assert exact[1].isinf().any() and (mask.cnt == mask.nk).any()
    out, lse = reference_forward(q, k, v, mask, 0.125, None, precision)
    assert why_wrong(out, lse, *exact, precision) is None
    last = out.clone()
    last[:, :, -1] *= 2
    assert "errors of" in why_wrong(last, lse, *exact, precision)
    assert "lse" in why_wrong(out, lse + 0.1, *exact, precision)
    assert "rows without keys" in why_wrong(out, lse.clamp(min=-9), *exact, precision)
    last[0, 0, -1] = torch.nan
    assert "errors of nan" in why_wrong(last, lse, *exact, precision)


def test_a_failed_self_check_disables_it_with_the_reason(monkeypatch):
    from vdit_sparse.kernels.block_sparse.hopper import launch as launching
    from vdit_sparse.kernels.block_sparse.hopper import self_check

    monkeypatch.setattr(launching, "multiprocessors", lambda device: 2)

    def broken(*call):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(self_check, "launch", broken)
    reason = self_check._check.__wrapped__(
        torch.device("cpu"), torch.bfloat16, 64, (128, 128), "bf16", False
    )
    assert reason == "its self-check failed: RuntimeError: no such instruction"


def test_tiles_by_falling_length(device):
    from vdit_sparse.kernels.block_sparse.hopper.order import longest_first

    cnt = torch.tensor([[[1, 4, 2], [3, 3, 9]]], dtype=torch.int32, device=device)
    mask = BlockMask(cnt.new_zeros(1, 2, 3, 9), cnt, 10)
    order, taken = longest_first(mask, (1, 2))
    assert order.dtype == torch.int32 and order.tolist() == [1, 2, 0, 2, 1, 0]
    assert taken.dtype == torch.int32 and taken.tolist() == [0]


@pytest.mark.parametrize("shared", [(2, 3), (1, 3), (2, 1)])
def test_order_of_many_tiles(shared, device):
    """More query blocks than one program of that kernel places, with many of the same length, and
    lists of which heads or batch rows share one."""
    from vdit_sparse.kernels.block_sparse.hopper.order import longest_first

    cnt = torch.randint(0, 9, (300, *shared), dtype=torch.int32, device=device).permute(1, 2, 0)
    order, _ = longest_first(BlockMask(cnt.new_zeros(*shared, 300, 1), cnt, 20), (2, 3))
    # Of equal ones the last comes first.
    expected = (300 * cnt.long() + torch.arange(300, device=device)).argsort(descending=True)
    assert torch.equal(order.view(2, 3, 300), expected.int().expand(2, 3, 300))
