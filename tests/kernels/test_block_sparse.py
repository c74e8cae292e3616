"""`block_sparse_attention`: every backend against float64, and what it refuses."""

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from tests.kernels.tolerance import assert_attention
from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.block_sparse import (
    BACKENDS,
    block_sparse_attention,
    choose_backend,
    explain,
)
from vdit_sparse.kernels.block_sparse.layout import real_keys
from vdit_sparse.kernels.block_sparse.tiles import TILES, Tile, nearest, tile_for

# Rows without keys have the logarithm of zero; the interpreter lets NumPy remark on it.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
OPERATOR = torch.ops.vdit_sparse.block_sparse_attention.default


@dataclass(frozen=True)
class Case:
    """One problem; lists "shared" by all heads, per "head", or per batch row ("batch")."""

    S: int = 200
    keys: int | None = None  # as many as queries
    D: int = 64
    B: int = 1
    block: int | tuple[int, int] = 128
    lists: str = "head"
    rows: str = "some"  # or "empty": one row without blocks; "full": two rows with all
    layout: str = "BHSD"  # or "BSHD", "fused": slices of one [B, S, 3, H, D]
    valid: bool = False
    kv_len: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32

    @property
    def blocks(self) -> tuple[int, int]:
        return (self.block, self.block) if isinstance(self.block, int) else self.block


CASES = {
    "one ragged block": Case(S=63),
    "one whole block": Case(S=128),
    "ragged": Case(),
    "one token over": Case(S=257),
    "whole blocks": Case(S=256),
    "blocks of 64": Case(block=64),
    "whole blocks of 64": Case(S=256, block=64),
    "query blocks of 64": Case(block=(64, 128)),
    "key blocks of 64": Case(block=(128, 64)),
    "more keys": Case(S=100, keys=257),
    "more queries": Case(S=257, keys=63),
    "shared lists": Case(lists="shared", B=2),
    "lists per batch row": Case(lists="batch", B=2),
    "row without blocks": Case(rows="empty", block=64),
    "rows with all blocks": Case(rows="full", block=64),
    "all rows full": Case(rows="all"),
    "masked slots": Case(valid=True, block=64),
    "masked slots in large blocks": Case(valid=True, rows="full"),
    "padded keys": Case(B=3, block=64, kv_len=(0, 77, 200)),
    "padded keys in full rows": Case(B=2, keys=256, rows="full", kv_len=(128, 250)),
    "padded keys and masked slots": Case(B=2, block=64, valid=True, kv_len=(100, 999)),
    "D of 32": Case(D=32),
    "D of 72": Case(D=72),
    "D of 128": Case(D=128),
    "D of 256": Case(D=256),
    "BSHD": Case(B=2, layout="BSHD"),
    "fused": Case(layout="fused", D=32),
    "fp16": Case(dtype=torch.float16),
    "fp16, BSHD": Case(D=128, layout="BSHD", dtype=torch.float16),
    "bf16": Case(dtype=torch.bfloat16),
    "bf16, BSHD": Case(B=2, D=128, layout="BSHD", dtype=torch.bfloat16),
    "bf16, whole blocks of 64": Case(S=256, D=128, block=64, dtype=torch.bfloat16),
    "bf16, padded keys": Case(B=2, D=128, block=64, kv_len=(50, 130), dtype=torch.bfloat16),
    "bf16, masked slots": Case(valid=True, D=128, dtype=torch.bfloat16),
    "bf16, D of 96": Case(D=96, dtype=torch.bfloat16),
}


def make(case: Case, device: torch.device):
    """q, k, v, mask, kv_len."""
    H, keys = 2, case.keys or case.S
    q, k, v = (_tensor(case, H, length) for length in (case.S, keys, keys))
    if case.layout == "fused":
        fused = torch.randn(case.B, case.S, 3, H, case.D, dtype=case.dtype)
        q, k, v = (fused[:, :, i].transpose(1, 2) for i in range(3))
    block_q, block_k = case.blocks
    nq, nk = -(-case.S // block_q), -(-keys // block_k)
    shape = {"shared": (1, 1), "head": (1, H), "batch": (case.B, H)}[case.lists]
    keep = torch.rand(*shape, nq, nk) < 0.6
    keep[..., torch.arange(nq), torch.arange(nq) % nk] = True
    if case.rows == "empty":
        keep[..., 0, :] = False
    if case.rows == "full":
        keep[..., -1, :] = True
        keep[..., 0, 0, :] = True
    if case.rows == "all":
        keep[...] = True
    valid = None
    if case.valid:
        valid = torch.randint(0, block_k + 1, (nk,), dtype=torch.int32)
    mask = BlockMask.from_keep(keep, case.blocks, valid=valid).to(device)
    kv_len = None
    if case.kv_len is not None:
        kv_len = torch.tensor(case.kv_len, dtype=torch.int32, device=device)
    return *(_moved(x, device) for x in (q, k, v)), mask, kv_len


def _tensor(case: Case, H: int, length: int) -> torch.Tensor:
    if case.layout == "BSHD":
        return torch.randn(case.B, length, H, case.D, dtype=case.dtype).transpose(1, 2)
    return torch.randn(case.B, H, length, case.D, dtype=case.dtype)


def _moved(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same values and strides on another device."""
    moved = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    return moved.copy_(x)


def attend(backend: str, q, k, v, mask, kv_len=None):
    """The call, or a skip with the backend's own reason."""
    reason = explain(q, k, v, mask)[backend]
    if reason is not None:
        pytest.skip(reason)
    return block_sparse_attention(q, k, v, mask, kv_len=kv_len, backend=backend)


@pytest.fixture
def poisoned(monkeypatch):
    """Memory from `new_empty` holds NaN, so that an output which nobody writes is seen."""
    new_empty = torch.Tensor.new_empty

    def poison(*args, **kw):
        made = new_empty(*args, **kw)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poison)


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
    for keys in (64, 128)[: case.blocks[1] // 64]:
        tile = Tile(64, keys, 4, 2, descriptors)
        result = launch(q, k, v, mask, case.D**-0.5, kv_len, tile)
        assert_attention(result, q, k, v, mask, kv_len)


@pytest.mark.parametrize("backend", BACKENDS)
def test_operator_contract(backend, device):
    q, k, v, mask, kv_len = make(Case(S=130, D=32, B=2, kv_len=(60, 130)), device)
    attend(backend, q, k, v, mask)
    blocks = [mask.nk, 128, 128]
    tensors = (q.transpose(1, 2).contiguous().transpose(1, 2), k, v, mask.idx, mask.cnt)
    for optional in ((None, None), (torch.full((2,), 65, dtype=torch.int32).to(device), kv_len)):
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


@pytest.mark.gpu
def test_triton_is_the_default_on_a_gpu(device):
    from vdit_sparse.kernels.block_sparse.triton import choose_tile, why_pointers

    q, k, v, mask, _ = make(Case(S=512, D=128, layout="BSHD", dtype=torch.bfloat16), device)
    assert choose_backend(q, k, v, mask) == "triton"
    if torch.cuda.get_device_capability()[0] >= 9 and torch.version.hip is None:
        assert why_pointers(q, k, v, mask) is None
        assert (
            choose_tile(q, k, v, mask).descriptors
            == TILES[
                (nearest(f"sm_{''.join(map(str, torch.cuda.get_device_capability()))}"), 128, 128)
            ].descriptors
        )


def test_gather_is_the_default_on_a_cpu():
    q, k, v, mask, _ = make(Case(S=128), torch.device("cpu"))
    assert choose_backend(q, k, v, mask) == "gather"
    assert explain(q, k, v, mask)["gather"] is None


def test_an_explicit_backend_runs_or_says_why_not(device):
    q, k, v, mask, _ = make(Case(S=128, D=320), device)
    with pytest.raises(ValueError, match="'triton' does not take this call: D is at most 256"):
        block_sparse_attention(q, k, v, mask, backend="triton")
    assert "D is at most 256" in explain(q, k, v, mask)["triton"]
    assert choose_backend(q, k, v, mask) == "gather"


def test_path_of_triton_says_why(device):
    from vdit_sparse.kernels.block_sparse.triton import why_pointers

    q, k, v, mask, _ = make(Case(S=128), torch.device("cpu"))
    assert "compute capability 9.0" in why_pointers(q, k, v, mask)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_103", "sm_121", "gfx950", "cpu"])
@pytest.mark.parametrize("blocks", [(64, 64), (128, 128), (64, 128), (128, 64)])
def test_tiles_fit_their_blocks(arch, blocks):
    for width, itemsize, descriptors in ((16, 2, False), (128, 2, True), (256, 2, False)):
        tile = tile_for(arch, width, itemsize, blocks, descriptors)
        assert blocks[0] % tile.rows == 0 and blocks[1] % tile.keys == 0
        assert descriptors or not tile.descriptors
    assert nearest("sm_121") == "sm_120" and nearest("sm_86") == "sm_80"


def test_importing_needs_no_triton():
    code = (
        "import sys, vdit_sparse.kernels.block_sparse, vdit_sparse.kernels.block_sparse.tiles;"
        "sys.exit('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    assert done.returncode == 0


def _change(**changes):
    """A call that is wrong in one thing."""
    q, k, v, mask, _ = make(Case(D=32, B=2), torch.device("cpu"))
    call = {"q": q, "k": k, "v": v, "mask": mask}
    return call | {name: make_it(call) for name, make_it in changes.items()}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": lambda c: c["q"][0]}, ValueError, r"q must be \[B, H, S, D\]"),
        ({"v": lambda c: c["v"][:, :, :100]}, ValueError, r"v \[B, H, keys, D\].*\(2, 2, 100, 32"),
        ({"k": lambda c: c["k"][:, :, :0]}, ValueError, "not empty"),
        ({"q": lambda c: c["q"][:1]}, ValueError, "must agree in B, H and D"),
        ({"q": lambda c: c["q"].double()}, TypeError, "one dtype of fp16, bf16 and fp32"),
        ({"k": lambda c: c["k"].half()}, TypeError, "torch.float32, torch.float16, torch.float32"),
        ({"q": lambda c: c["q"].to("meta")}, ValueError, "share a device, got meta, cpu, cpu"),
        ({"q": lambda c: c["q"].mT.contiguous().mT}, ValueError, r"pass q.contiguous\(\)"),
        ({"q": lambda c: c["q"].requires_grad_()}, RuntimeError, "has no backward"),
        ({"kv_len": lambda c: torch.ones(2)}, ValueError, r"kv_len must be int32 \[2\], got"),
        (
            {"kv_len": lambda c: torch.ones(2, dtype=torch.int32, device="meta")},
            ValueError,
            "kv_len must be on cpu",
        ),
        ({"q": lambda c: c["q"][:, :, :100]}, ValueError, r"2 x 2 blocks.*100 queries.*1 x 2"),
        (
            {"mask": lambda c: replace(c["mask"], idx=c["mask"].idx.expand(3, -1, -1, -1),
                                       cnt=c["mask"].cnt.expand(3, -1, -1))},
            ValueError,
            r"1 or 2 batch rows and 1 or 2 heads like q, got \(3, 2\)",
        ),
        ({"mask": lambda c: c["mask"].to("meta")}, ValueError, "mask must be on cpu like q"),
        ({"precision": lambda c: "int8_bf16"}, ValueError, r"one of \('bf16',\), got 'int8_bf16'"),
        ({"backend": lambda c: "hopper"}, ValueError, "'reference'.*got 'hopper'"),
        ({"scale": lambda c: -1.0}, ValueError, "scale must be a positive number, got -1.0"),
    ],
)  # fmt: skip
def test_wrong_calls_are_refused(changes, error, message):
    call = _change(**changes)
    with pytest.raises(error, match=message):
        block_sparse_attention(
            call.pop("q"), call.pop("k"), call.pop("v"), call.pop("mask"), **call
        )


def test_gradients_are_fine_when_nobody_records_them():
    call = _change()
    with torch.no_grad():
        out, _ = block_sparse_attention(
            call["q"].requires_grad_(), call["k"], call["v"], call["mask"]
        )
    assert not out.requires_grad
