"""`block_mass`: every backend against float64, and the sums that attention promises."""

from dataclasses import dataclass

import pytest
import torch

from tests.kernels.cases import Case as Tensors
from tests.kernels.cases import make
from vdit_sparse.kernels.block_mask import BlockMask, block_pair
from vdit_sparse.kernels.block_mass import BACKENDS, block_mass, chunked
from vdit_sparse.kernels.block_mass.reference import forward as reference_forward
from vdit_sparse.kernels.block_sparse import block_sparse_attention
from vdit_sparse.kernels.block_sparse.layout import real_keys
from vdit_sparse.kernels.block_sparse.tiles import Tile

# Garbage in the padding goes through the products; NumPy remarks on it in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
HALF, BF16 = torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One problem; `valid`: whether blocks hold padding."""

    S: int = 200
    D: int = 64
    B: int = 1
    block: int | tuple[int, int] = 64
    layout: str = "BHSD"
    valid: bool = False
    dtype: torch.dtype = torch.float32


CASES = {
    "one ragged block": Case(S=63),
    "whole blocks": Case(S=256, block=128, dtype=HALF),
    "one token over": Case(S=129, B=2, dtype=HALF),
    "ragged": Case(S=130),
    "ragged blocks of 128": Case(block=128, dtype=HALF),
    "query blocks of 64": Case(block=(64, 128), dtype=HALF),
    "key blocks of 64": Case(block=(128, 64), dtype=HALF),
    "D of 72": Case(D=72, dtype=HALF),
    "D of 128": Case(S=100, D=128, block=128),
    "D of 256": Case(D=256, block=128, dtype=HALF),
    "BSHD": Case(B=2, D=128, layout="BSHD", dtype=HALF),
    "fused": Case(S=128, D=32, layout="fused", dtype=HALF),
    "padding": Case(B=2, valid=True, dtype=HALF),
    "padding in blocks of 128": Case(S=130, block=128, valid=True),
    "padding, whole blocks": Case(S=256, block=128, valid=True, dtype=HALF),
    "bf16": Case(B=2, D=128, block=128, dtype=BF16),
    "bf16, blocks of 64": Case(S=320, dtype=BF16),
    "bf16, padding": Case(S=257, D=128, block=64, layout="BSHD", valid=True, dtype=BF16),
}


def problem(case: Case, device: torch.device):
    """q, k, v, their LSE with every real key, and valid."""
    kind = Tensors(
        S=case.S, D=case.D, B=case.B, block=case.block, layout=case.layout, rows="all",
        dtype=case.dtype, valid=case.valid,
    )  # fmt: skip
    q, k, v, mask, _ = make(kind, device)
    _, lse = block_sparse_attention(q, k, v, mask, backend="reference")
    return q, k, v, lse, mask.valid


def mass_of(backend: str, q, k, lse, block, **options):
    """The call, or a skip where Triton's interpreter cannot multiply."""
    if backend == "triton" and q.dtype == BF16 and q.device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 numbers")
    return block_mass(q, k, lse, block, backend=backend, **options)


def exact(q, k, lse, block, valid=None, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return reference_forward(q, k, lse, block_pair(block), valid, scale, compute=torch.float64)


def assert_mass(mass, expected):
    assert mass.dtype == torch.float32 and mass.shape == expected.shape
    torch.testing.assert_close(mass.double(), expected, rtol=1e-3, atol=1e-6)


def real_rows(case: Case, valid, device) -> torch.Tensor:
    """Real rows of each query block, float32 `[nq]`."""
    block = block_pair(case.block)[0]
    nq = -(-case.S // block)
    rows = torch.full((nq,), block, device=device)
    rows[-1] = case.S - (nq - 1) * block
    return (rows if valid is None else torch.minimum(rows, valid)).float()


def test_reference_is_the_sum_over_single_tokens():
    q, k, _, lse, valid = problem(Case(S=130, valid=True), torch.device("cpu"))
    expected = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    weights = (q.double() @ k.double().mT / 8 - lse.double()[..., None]).exp()
    for p in range(3):
        for c in range(3):
            rows = range(p * 64, min(p * 64 + int(valid[p]), 130))
            keys = range(c * 64, min(c * 64 + int(valid[c]), 130))
            expected[:, :, p, c] = weights[:, :, rows][..., keys].sum((-1, -2))
    torch.testing.assert_close(exact(q, k, lse, 64, valid), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_float64(case, backend, device, poisoned):
    q, k, _, lse, valid = problem(case, device)
    mass = mass_of(backend, q, k, lse, case.block, valid=valid)
    assert_mass(mass, exact(q, k, lse, case.block, valid))
    sums = real_rows(case, valid, device).expand(case.B, 2, -1)
    torch.testing.assert_close(mass.sum(-1), sums, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("garbage", [torch.inf, torch.nan])
@pytest.mark.parametrize("block", [64, 128])
def test_padding_may_hold_anything(block, garbage, backend, device):
    q, k, _, lse, valid = problem(Case(S=200, block=block, valid=True, dtype=HALF), device)
    expected = mass_of(backend, q, k, lse, block, valid=valid)
    padding = ~real_keys(200, len(valid), block, valid, None)[0, :200]
    assert padding.any()
    for x in (q, k):
        x.masked_fill_(padding[:, None], garbage)
    lse = lse.masked_fill(padding, garbage)
    assert torch.equal(mass_of(backend, q, k, lse, block, valid=valid), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_past_the_end_of_a_head_are_not_read(backend, device):
    """Heads lie behind one another: a ragged tile must not take the next head's rows as its own."""
    q, k, _, lse, _ = problem(Case(dtype=HALF), device)
    expected = mass_of(backend, q, k, lse, 64)
    for x in (q, k, lse):
        x[:, 1] = torch.nan
    assert torch.equal(mass_of(backend, q, k, lse, 64)[:, 0], expected[:, 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_dense_attention_sum_to_their_number(backend, device):
    """The two passes of the search with the backends that users get."""
    dtype = BF16 if device.type == "cuda" else torch.float32
    case = Case(S=300, D=32, block=128, dtype=dtype)
    q, k, v, _, _ = problem(case, device)
    every = BlockMask.full(300, device=device)
    _, lse = block_sparse_attention(q, k, v, every)
    mass = mass_of(backend, q, k, lse, 128)
    expected = torch.tensor([128.0, 128.0, 44.0], device=device).expand(1, 2, 3)
    torch.testing.assert_close(mass.sum(-1), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_in_the_lse_scales_rows(backend, device):
    q, k, _, lse, _ = problem(Case(S=130, dtype=HALF), device)
    shift = torch.tensor([0.5, -2.0], device=device)[None, :, None]
    mass = mass_of(backend, q, k, lse, 64)
    shifted = mass_of(backend, q, k, lse + shift, 64)
    torch.testing.assert_close(shifted, mass * (-shift).exp()[..., None], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_keys_count_nothing(backend, device):
    q, k, _, lse, _ = problem(Case(S=200, dtype=HALF), device)
    lse[:, :, 10:20] = -torch.inf
    lse[:, 1, 64:128] = -torch.inf
    q[:, :, 15] = torch.nan
    mass = mass_of(backend, q, k, lse, 64)
    assert_mass(mass, exact(q, k, lse, 64))
    assert (mass[:, 1, 1] == 0).all()
    torch.testing.assert_close(mass[:, 0, 0].sum(-1), torch.full_like(mass[:, 0, 0, 0], 54.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_scales(backend, device):
    q, k, _, lse, _ = problem(Case(S=128, dtype=HALF), device)
    mass = mass_of(backend, q, k, lse, 64, scale=0.2)
    assert_mass(mass, exact(q, k, lse, 64, scale=0.2))


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("name", ["ragged", "padding", "BSHD"])
def test_both_paths_and_tiles_of_triton(name, rows, descriptors, device):
    """Tiles of a part of a block, of one block and of two."""
    from vdit_sparse.kernels.block_mass.triton import launch

    if device.type == "cuda" and torch.cuda.get_device_capability()[0] < 9 and descriptors:
        pytest.skip("this GPU has no tensor memory accelerator")
    case = CASES[name]
    for block in (64, 128):
        q, k, _, lse, valid = problem(
            Case(case.S, case.D, case.B, block, case.layout, case.valid, HALF), device
        )
        tile = Tile(rows, 64, 4, 2, descriptors)
        mass = launch(q, k, lse, (block, block), valid, case.D**-0.5, tile)
        assert_mass(mass, exact(q, k, lse, block, valid))


def test_chunks_of_one_block_give_the_same(monkeypatch):
    q, k, _, lse, valid = problem(Case(S=300, B=2, valid=True), torch.device("cpu"))
    whole = block_mass(q, k, lse, 64, valid=valid, backend="chunked")
    monkeypatch.setattr(chunked, "SCORES_BUDGET", 1)
    chunks = block_mass(q, k, lse, 64, valid=valid, backend="chunked")
    torch.testing.assert_close(chunks, whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_103", "gfx942", "cpu"])
@pytest.mark.parametrize("block_k", [64, 128])
def test_tiles_fit_their_blocks(arch, block_k):
    from vdit_sparse.kernels.block_mass.triton import choose_tile

    for width, itemsize, descriptors in ((16, 2, False), (64, 2, True), (128, 4, False)):
        tile = choose_tile(arch, width, itemsize, block_k, descriptors)
        assert block_k % tile.keys == 0 and 128 % tile.rows == 0
        assert descriptors or not tile.descriptors


@pytest.mark.gpu
def test_triton_is_the_default_on_a_gpu(device):
    q, k, _, lse, _ = problem(Case(S=512, D=128, block=128, layout="BSHD", dtype=BF16), device)
    assert torch.equal(block_mass(q, k, lse, 128), block_mass(q, k, lse, 128, backend="triton"))


def test_chunked_is_the_default_on_a_cpu():
    q, k, _, lse, _ = problem(Case(S=130), torch.device("cpu"))
    assert torch.equal(block_mass(q, k, lse, 64), block_mass(q, k, lse, 64, backend="chunked"))


def test_an_explicit_backend_runs_or_says_why_not(device):
    q, k, _, lse, _ = problem(Case(S=64, D=320), device)
    with pytest.raises(ValueError, match="'triton' does not take this call: D is at most 256"):
        block_mass(q, k, lse, 64, backend="triton")
    assert_mass(block_mass(q, k, lse, 64), exact(q, k, lse, 64))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": lambda c: c["q"][0]}, ValueError, r"both be \[B, H, S, D\]"),
        ({"k": lambda c: c["k"][:, :, :100]}, ValueError, r"got \(2, 2, 130, 32\) and \(2, 2, 100"),
        ({"k": lambda c: c["k"].half()}, TypeError, "one dtype of fp16, bf16 and fp32, got"),
        ({"lse": lambda c: c["lse"].double()}, ValueError, r"float32 \(2, 2, 130\).*float64"),
        ({"lse": lambda c: c["lse"][:, :, :9]}, ValueError, r"got torch.float32 \(2, 2, 9\)"),
        ({"k": lambda c: c["k"].to("meta")}, ValueError, "share a device, got cpu, meta, cpu"),
        ({"k": lambda c: c["k"].mT.contiguous().mT}, ValueError, r"pass k.contiguous\(\)"),
        ({"q": lambda c: c["q"].requires_grad_()}, RuntimeError, "has no backward"),
        ({"block": lambda c: 32}, ValueError, r"one or two of \(64, 128\), got 32"),
        ({"block": lambda c: (64, 64, 64)}, ValueError, "one or two of"),
        ({"block": lambda c: (64, 128), "valid": lambda c: torch.ones(2)}, ValueError, "one size"),
        ({"valid": lambda c: torch.ones(3)}, ValueError, r"int32 \[3\], got torch.float32"),
        (
            {"valid": lambda c: torch.ones(3, dtype=torch.int32, device="meta")},
            ValueError,
            "valid must be on cpu like q, got meta",
        ),
        ({"scale": lambda c: 0.0}, ValueError, "scale must be a positive number, got 0.0"),
        ({"backend": lambda c: "gather"}, ValueError, "'chunked'.*got 'gather'"),
    ],
)
def test_wrong_calls_are_refused(changes, error, message):
    q, k, _, lse, _ = problem(Case(S=130, D=32, B=2), torch.device("cpu"))
    call = {"q": q, "k": k, "lse": lse, "block": 64}
    call |= {name: make_it(call) for name, make_it in changes.items()}
    with pytest.raises(error, match=message):
        block_mass(call.pop("q"), call.pop("k"), call.pop("lse"), call.pop("block"), **call)
