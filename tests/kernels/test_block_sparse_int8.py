"""8-bit precisions of `block_sparse_attention`: error bars, and Triton against the reference."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cosine_similarity

from tests.kernels.cases import CASES, Case, make
from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.block_sparse import (
    block_sparse_attention,
    choose_backend,
    explain,
    reference,
)
from vdit_sparse.kernels.block_sparse.layout import real_keys
from vdit_sparse.kernels.block_sparse.reference import forward as reference_forward
from vdit_sparse.kernels.block_sparse.tiles import Tile, tile_for
from vdit_sparse.kernels.quant import smooth_quantize

pytest_plugins = ["tests.kernels.float8"]
# Rows without keys have the logarithm of zero; the interpreter lets NumPy remark on it.
pytestmark = [
    pytest.mark.usefixtures("float8"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]
PRECISIONS = ("int8_bf16", "int8_fp8")
# Relative L2 error of what is not an outlier: 0.013 from rounding q and k, 0.026 from each of the
# weights and v in e4m3.
BARS = {"int8_bf16": 1.6e-2, "int8_fp8": 4.5e-2}
# One channel ten times as large; see test_quant_errors.py.
OUTLIER_BARS = {"int8_bf16": 2e-2, "int8_fp8": 4.5e-2}
GEOMETRIES = (
    "one ragged block", "query blocks of 64", "key blocks of 64", "more keys",
    "row without blocks", "rows with all blocks", "padded keys",
    "padded keys and masked slots", "D of 72", "D of 256", "fp16, BSHD",
    "bf16, padded keys", "bf16, masked slots",
)  # fmt: skip


def attend(backend: str, q, k, v, mask, precision: str, kv_len=None):
    """The call, or a skip with the backend's own reason."""
    if backend == "triton" and precision == "int8_fp8" and q.device.type == "cpu":
        # Refused because of what the fixture `float8` puts right.
        from vdit_sparse.kernels.block_sparse.triton import forward

        return forward(q, k, v, mask, q.shape[-1] ** -0.5, kv_len, precision)
    reason = explain(q, k, v, mask, precision)[backend]
    if reason is not None:
        pytest.skip(reason)
    return block_sparse_attention(
        q, k, v, mask, kv_len=kv_len, precision=precision, backend=backend
    )


def same_levels(monkeypatch):
    """From here on the reference takes the integers that the kernels take, on a GPU Triton's. Its
    own differ by one level where the order of a sum decides on which side of a tie a number lies
    (test_quant.py says how many do): one level of a query moves its lse by scale * step * the mean
    of that channel of the keys it sees, up to 3e-4 on an H200, and a bound of that size would hide
    faults."""

    def quantize(*tensors, backend, **options):
        return smooth_quantize(*tensors, **options)

    monkeypatch.setattr(reference, "smooth_quantize", quantize)


def in_float64(q, k, v, mask, kv_len=None):
    tensors = (x.double() for x in (q, k, v))
    return reference_forward(*tensors, mask, q.shape[-1] ** -0.5, kv_len, compute=torch.float64)


def error_of(out, exact) -> float:
    return float((out.double() - exact).norm() / exact.norm())


def problem(data: str, device, dtype):
    q, k, v, mask, _ = make(Case(S=256, D=128, block=128, dtype=dtype), device)
    if data == "offset":
        k = k + 10
    if "outlier" in data:
        k[..., 3] *= 10
    if data == "outlier of q and k":
        q[..., 3] *= 10
    return q, k, v, mask


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("data", ["normal", "offset", "outlier of k", "outlier of q and k"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_error_bars(precision, data, dtype, device, monkeypatch):
    q, k, v, mask = problem(data, device, dtype)
    exact, exact_lse = in_float64(q, k, v, mask)
    out, lse = attend("reference", q, k, v, mask, precision)
    outlier = "outlier" in data
    error = error_of(out, exact)
    assert error <= (OUTLIER_BARS if outlier else BARS)[precision]
    cosine = cosine_similarity(out.double().flatten(), exact.flatten(), 0)
    assert cosine >= 0.998
    lse_bar = 0.02 * exact_lse.abs().max() if outlier else 0.05
    assert (lse - exact_lse).abs().max() <= lse_bar
    ours, ours_lse = attend("triton", q, k, v, mask, precision)
    assert error_of(ours, exact) <= 1.1 * error
    assert (ours_lse - exact_lse).abs().max() <= lse_bar
    same_levels(monkeypatch)
    _, lse = attend("reference", q, k, v, mask, precision)
    torch.testing.assert_close(ours_lse, lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_triton_is_the_reference(precision, name, device, monkeypatch):
    q, k, v, mask, kv_len = make(CASES[name], device)
    expected, expected_lse = attend("reference", q, k, v, mask, precision, kv_len)
    exact, exact_lse = in_float64(q, k, v, mask, kv_len)
    error = error_of(expected, exact)
    assert error <= BARS[precision]
    same_levels(monkeypatch)
    expected, expected_lse = attend("reference", q, k, v, mask, precision, kv_len)
    out, lse = attend("triton", q, k, v, mask, precision, kv_len)
    assert out.dtype == q.dtype and out.stride() == expected.stride()
    empty = exact_lse.isinf()
    assert torch.equal(lse.isinf(), empty) and not out[empty].any()
    torch.testing.assert_close(lse[~empty], expected_lse[~empty], rtol=1e-5, atol=1e-5)
    # Only weights in e4m3 depend on the order of the keys.
    rounding = {"int8_fp8": 3e-2, "int8_bf16": 2 * torch.finfo(q.dtype).eps + 1e-5}[precision]
    assert error_of(out, expected.double()) <= rounding
    assert error_of(out, exact) <= 1.1 * error


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("valid", [True, False])
def test_padding_may_hold_anything(valid, precision, backend, device):
    q, k, v, mask, kv_len = make(Case(S=130, block=64, valid=valid, kv_len=(77,)), device)
    expected = attend(backend, q, k, v, mask, precision, kv_len)
    real = real_keys(130, mask.nk, 64, mask.valid, kv_len)[:, :130]
    for x in (k, v):
        x.masked_fill_(~real[:, None, :, None], torch.nan)
    out, lse = attend(backend, q, k, v, mask, precision, kv_len)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_heads_and_batch_rows_are_independent(precision, backend, device):
    q, k, v, mask, kv_len = make(Case(B=2, lists="batch", block=64, kv_len=(90, 200)), device)
    out, lse = attend(backend, q, k, v, mask, precision, kv_len)
    b, h = slice(1, 2), slice(1, 2)
    alone = BlockMask(mask.idx[b, h], mask.cnt[b, h], mask.nk, 64, 64)
    single = attend(backend, q[b, h], k[b, h], v[b, h], alone, precision, kv_len[b])
    torch.testing.assert_close(out[b, h], single[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse[b, h], single[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_small_weights_survive_fp8(backend, device):
    """One key has nearly all the weight and the value 0; the others' weights of e^-8 are below the
    smallest number of e4m3 until they are multiplied by 448."""
    q = torch.zeros(1, 1, 64, 64, device=device)
    k, v = torch.zeros_like(q.repeat(1, 1, 2, 1)), torch.ones_like(q.repeat(1, 1, 2, 1))
    q[..., 0] = 8
    k[:, :, 0, 0] = 8
    v[:, :, 0] = 0
    mask = BlockMask.from_keep(torch.ones(1, 2, dtype=torch.bool, device=device), 64)
    exact, _ = in_float64(q, k, v, mask)
    out, _ = attend(backend, q, k, v, mask, "int8_fp8")
    assert exact.max() < 0.05
    torch.testing.assert_close(out.double(), exact, rtol=0.1, atol=0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", ["reference", "triton", "hopper"])
def test_queries_of_zeros_see_no_masked_key(backend, precision, device):
    """The scale of a block of zeros is as good as 0, and -inf times 0 would be NaN."""
    q = torch.zeros(1, 1, 128, 64, device=device, dtype=torch.float16)
    k = torch.zeros(1, 1, 384, 64, device=device, dtype=torch.float16)
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(0)).to(k)
    keep = torch.ones(1, 3, dtype=torch.bool, device=device)
    valid = torch.tensor([128, 0, 128], dtype=torch.int32, device=device)
    mask = replace(BlockMask.from_keep(keep, 128), valid=valid)
    out, _ = attend(backend, q, k, v, mask, precision)
    real = torch.cat([v[:, :, :128], v[:, :, 256:]], 2).double().mean(2, keepdim=True)
    torch.testing.assert_close(out.double(), real.expand_as(out), atol=1e-2, rtol=0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["ragged", "padded keys and masked slots"])
def test_both_paths_of_triton(name, precision, device, monkeypatch):
    from vdit_sparse.kernels.block_sparse.int8.triton import launch

    if device.type == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("this GPU has no tensor memory accelerator")
    case = replace(CASES[name], dtype=torch.float16)
    if precision == "int8_bf16":
        case = replace(case, valid=False)
    q, k, v, mask, kv_len = make(case, device)
    same_levels(monkeypatch)
    expected, expected_lse = attend("reference", q, k, v, mask, precision, kv_len)
    for tile in (Tile(64, 64, 4, 2, True), Tile(64, 64, 4, 2, False)):
        out, lse = launch(q, k, v, mask, 0.125, kv_len, precision, tile)
        assert error_of(out, expected.double()) <= (3e-2 if precision == "int8_fp8" else 1e-3)
        finite = expected_lse.isfinite()
        torch.testing.assert_close(lse[finite], expected_lse[finite], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_operator_contract(precision, device):
    q, k, v, mask, kv_len = make(Case(S=70, D=32, block=64, layout="BSHD", kv_len=(60,)), device)
    operator = torch.ops.vdit_sparse.block_sparse_attention.default
    call = (q, k, v, mask.idx, mask.cnt, None, kv_len, [mask.nk, 64, 64], 0.2, precision)
    torch.library.opcheck(operator, (*call, "reference"))


def test_plain_torch_says_what_to_do_instead():
    q, k, v, mask, _ = make(Case(S=64, block=64), torch.device("cpu"))
    for precision in PRECISIONS:
        assert choose_backend(q, k, v, mask, precision) == "gather"
        message = f"plain torch has no fast {precision}; use precision='bf16', or backend='refer"
        with pytest.raises(ValueError, match=message):
            block_sparse_attention(q, k, v, mask, precision=precision)


@pytest.mark.parametrize("arch", ["sm_80", "gfx942"])
def test_fp8_needs_a_gpu_that_has_it(arch, monkeypatch):
    from vdit_sparse.kernels.block_sparse import triton

    monkeypatch.setattr(triton, "INTERPRETED", False)
    monkeypatch.setattr(triton, "architecture", lambda device: arch)
    reason = triton.why_no_fp8(torch.device("cpu"))
    assert reason == f"int8_fp8 needs NVIDIA compute capability 8.9, this is {arch}; use int8_bf16"


@pytest.mark.gpu
def test_the_default_on_a_gpu(device):
    q, k, v, mask, _ = make(Case(S=512, D=128, layout="BSHD", dtype=torch.bfloat16), device)
    for precision in PRECISIONS:
        hopper = explain(q, k, v, mask, precision)["hopper"]
        assert choose_backend(q, k, v, mask, precision) == ("triton" if hopper else "hopper")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_103", "gfx950"])
@pytest.mark.parametrize("blocks", [(64, 64), (128, 128), (64, 128), (128, 64)])
def test_tiles_fit_their_blocks(arch, blocks):
    for precision in PRECISIONS:
        for width in (32, 64, 128, 256):
            tile = tile_for(arch, width, 2, blocks, True, precision)
            assert blocks[0] % tile.rows == 0 and blocks[1] % tile.keys == 0 and tile.keys >= 32
