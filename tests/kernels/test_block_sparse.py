"""`block_sparse_attention`: every backend against float64."""

from dataclasses import replace

import pytest
import torch

from tests.kernels.cases import CASES, Case, make
from tests.kernels.tolerance import assert_attention
from vdit_sparse.kernels.block_mask import BlockMask, block_pair
from vdit_sparse.kernels.block_sparse import BACKENDS, block_sparse_attention, explain
from vdit_sparse.kernels.block_sparse.layout import real_keys
from vdit_sparse.kernels.block_sparse.tiles import Tile

# Rows without keys have the logarithm of zero; the interpreter lets NumPy remark on it.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
OPERATOR = torch.ops.vdit_sparse.block_sparse_attention.default


def attend(backend: str, q, k, v, mask, kv_len=None):
    """The call, or a skip with the backend's own reason."""
    reason = explain(q, k, v, mask)[backend]
    if reason is not None:
        pytest.skip(reason)
    return block_sparse_attention(q, k, v, mask, kv_len=kv_len, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_float64(case, backend, device, poisoned):
    q, k, v, mask, kv_len = make(case, device)
    assert_attention(attend(backend, q, k, v, mask, kv_len), q, k, v, mask, kv_len)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("garbage", [torch.inf, torch.nan])
@pytest.mark.parametrize(("valid", "kv_len"), [(True, (77, 120)), (False, (77, 120)), (True, None)])
def test_padding_may_hold_anything(valid, kv_len, garbage, backend, device):
    case = Case(B=2, S=130, block=64, valid=valid, kv_len=kv_len)
    q, k, v, mask, kv_len = make(case, device)
    expected = attend(backend, q, k, v, mask, kv_len)
    real = real_keys(130, mask.nk, 64, mask.valid, kv_len)[:, :130]
    for x in (k, v):
        x.masked_fill_(~real[:, None, :, None], garbage)
    out, lse = attend(backend, q, k, v, mask, kv_len)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_past_the_end_of_a_head_are_not_read(backend, device):
    """Heads lie behind one another: a ragged tile must not take the next head's rows as its own."""
    q, k, v, mask, _ = make(Case(), device)
    expected = attend(backend, q, k, v, mask)
    for x in (q, k, v):
        x[:, 1] = torch.nan
    out, lse = attend(backend, q, k, v, mask)
    assert torch.equal(out[:, 0], expected[0][:, 0]) and torch.equal(lse[:, 0], expected[1][:, 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_rows_are_independent(backend, device):
    q, k, v, mask, kv_len = make(Case(B=2, lists="batch", block=64, kv_len=(90, 200)), device)
    out, lse = attend(backend, q, k, v, mask, kv_len)
    for b in range(2):
        one = slice(b, b + 1)
        alone = BlockMask(mask.idx[one], mask.cnt[one], mask.nk, 64, 64)
        single = attend(backend, q[one], k[one], v[one], alone, kv_len[one])
        torch.testing.assert_close(out[one], single[0], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(lse[one], single[1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["BHSD", "BSHD", "fused"])
def test_out_lies_in_memory_like_q(layout, backend, device):
    q, k, v, mask, _ = make(Case(S=128, B=2, D=32, layout=layout), device)
    out, lse = attend(backend, q, k, v, mask)
    dense = out if layout == "BHSD" else out.transpose(1, 2)
    assert dense.is_contiguous() and lse.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_scales(backend, device):
    q, k, v, mask, _ = make(Case(S=128, D=64), device)
    attend(backend, q, k, v, mask)
    scaled = block_sparse_attention(q, k, v, mask, scale=0.25, backend=backend)
    twice = block_sparse_attention(q * 2, k, v, mask, backend=backend)
    torch.testing.assert_close(scaled, twice, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("name", ["ragged", "padded keys", "BSHD"])
def test_both_paths_of_triton(name, descriptors, device):
    from vdit_sparse.kernels.block_sparse.triton import launch

    if device.type == "cuda" and torch.cuda.get_device_capability()[0] < 9 and descriptors:
        pytest.skip("this GPU has no tensor memory accelerator")
    case = replace(CASES[name], dtype=torch.float16)
    q, k, v, mask, kv_len = make(case, device)
    for keys in (64, 128)[: block_pair(case.block)[1] // 64]:
        tile = Tile(64, keys, 4, 2, descriptors)
        result = launch(q, k, v, mask, case.D**-0.5, kv_len, tile)
        assert_attention(result, q, k, v, mask, kv_len)


@pytest.mark.parametrize("backend", BACKENDS)
def test_operator_contract(backend, device):
    q, k, v, mask, kv_len = make(Case(S=70, D=32, B=2, block=64, kv_len=(60, 70)), device)
    attend(backend, q, k, v, mask)
    blocks = [mask.nk, 64, 64]
    tensors = (q.transpose(1, 2).contiguous().transpose(1, 2), k, v, mask.idx, mask.cnt)
    for optional in ((None, None), (torch.full((2,), 35, dtype=torch.int32).to(device), kv_len)):
        torch.library.opcheck(OPERATOR, (*tensors, *optional, blocks, 0.2, "bf16", backend))


@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
def test_compiles_as_one_graph(layout, device):
    q, k, v, mask, kv_len = make(Case(S=130, D=32, layout=layout, kv_len=(100,)), device)

    def layer(q, k, v, kv_len):
        out, lse = block_sparse_attention(q * 1.5, k, v, mask, kv_len=kv_len)
        return out.transpose(1, 2).flatten(2) + 1, lse

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(q, k, v, kv_len), layer(q, k, v, kv_len), strict=True):
        torch.testing.assert_close(got, expected)
        assert got.stride() == expected.stride()
