"""`reorder` and `inverse`: every backend against plain indexing, bit for bit."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vdit_sparse.kernels.backends import choose
from vdit_sparse.kernels.reorder import BACKENDS, inverse, reorder

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.int8)
LAYOUTS = ("BHSD", "BSHD", "fused", "sliced")


def rows_of(device, dtype=torch.float32, layout="BHSD", B=2, H=3, S=37, D=16) -> torch.Tensor:
    """`[B, H, S, D]` of whole numbers from -100 to 100, which all dtypes hold."""
    shapes = {
        "BHSD": (B, H, S, D),
        "BSHD": (B, S, H, D),
        "fused": (B, S, 3, H, D),
        "sliced": (B, H, S, D + 3),
    }
    x = torch.randint(-100, 101, shapes[layout], device=device).to(dtype)
    if layout == "fused":
        return x[:, :, 1].transpose(1, 2)
    if layout == "sliced":
        return x[..., 1 : D + 1]
    return x.transpose(1, 2) if layout == "BSHD" else x


def order_of(device, S=37, slots=50, heads=None, dtype=torch.int64) -> torch.Tensor:
    """Every token once, in `slots` slots, of which the others are -1."""
    several = [torch.randperm(slots, device=device) for _ in range(heads or 1)]
    order = torch.stack(several)
    order = torch.where(order < S, order, -1).to(dtype)
    return order if heads else order[0]


def expected_rows(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(*x.shape[:2], order.shape[-1], x.shape[3], dtype=torch.float64)
    for h, head in enumerate(order.expand(x.shape[1], -1).tolist()):
        for slot, token in enumerate(head):
            if token >= 0:
                out[:, h, slot] = x[:, h, token].double().cpu()
    return out


def check(x: torch.Tensor, order: torch.Tensor, backend: str) -> torch.Tensor:
    out = reorder(x, order, backend=backend)
    assert out.dtype == x.dtype and out.device == x.device
    expected = expected_rows(x, order)
    assert out.shape == expected.shape and torch.equal(out.double().cpu(), expected)
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [None, 3], ids=["shared", "per head"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, heads, backend, device):
    x = rows_of(device, layout=layout)
    out = check(x, order_of(device, heads=heads), backend)
    token_major = layout in ("BSHD", "fused")
    assert out.transpose(1, 2).is_contiguous() == token_major
    assert out.is_contiguous() != token_major


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("D", [1, 7, 64, 72])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_widths(dtype, D, backend, device):
    check(rows_of(device, dtype, "BSHD", D=D), order_of(device), backend)
    check(rows_of(device, dtype, "sliced", D=D), order_of(device, heads=3), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bool, torch.float64, torch.int64])
def test_bits_of_any_dtype(dtype, backend, device):
    x = torch.randint(0, 2, (1, 2, 20, 8), device=device).to(dtype)
    check(x, order_of(device, 20, 30), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("slots", [5, 37, 129, 2100])
def test_orders_may_be_shorter_or_longer_and_repeat(slots, backend, device):
    order = torch.randint(-1, 37, (3, slots), dtype=torch.int32, device=device)
    check(rows_of(device, D=2), order, backend)
    check(rows_of(device, D=2), order[1], backend)
    strided = torch.randint(-1, 37, (slots, 3), device=device).t()
    check(rows_of(device, D=2), strided, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [None, 3], ids=["shared", "per head"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back(layout, heads, backend, device):
    x = rows_of(device, torch.float16, layout)
    order = order_of(device, heads=heads, dtype=torch.int32)
    back = inverse(order, 37)
    assert back.dtype == torch.int64 and back.shape == (*order.shape[:-1], 37)
    there = reorder(x, order, backend=backend)
    assert torch.equal(reorder(there, back, backend=backend), x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_slots_are_zero_whatever_token_0_holds(backend, device):
    x = rows_of(device)
    x[:, :, 0] = torch.nan
    order = torch.tensor([3, -1, 5, -1], device=device)
    out = check(x, order, backend)
    assert (out[:, :, [1, 3]] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [None, 3], ids=["shared", "per head"])
def test_lse(heads, backend, device):
    order = order_of(device, heads=heads)
    for lse in (torch.randn(2, 3, 37, device=device), torch.randn(2, 37, 3, device=device).mT):
        out = reorder(lse, order, backend=backend)
        expected = expected_rows(lse[..., None], order)[..., 0]
        assert torch.equal(out.double().cpu(), expected)
        assert out.stride() == torch.empty_like(out).stride()


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
def test_offsets_past_two_to_the_31(layout, device):
    """Single bytes, of which the last head's lie 2^31 behind."""
    x = torch.empty(1, 3, 2**24, 64, dtype=torch.int8, device=device)
    if layout == "BSHD":
        x = x.view(1, 2**24, 3, 64).transpose(1, 2)
    x = x[..., 1:]
    ends = torch.tensor([2**24 - 1, 0], device=device)
    x[:, :, ends] = torch.randint(-100, 100, (1, 3, 2, 63), dtype=torch.int8, device=device)
    assert torch.equal(reorder(x, ends, backend="triton"), x[:, :, ends])


def test_inverse_drops_masked_slots_and_marks_absent_tokens(device):
    order = torch.tensor([[2, -1, 0, -1], [1, 2, -1, -1]], device=device)
    assert inverse(order, 3).tolist() == [[2, -1, 0], [-1, 0, 1]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 4)}, ValueError, r"x must be \[B, H, S, D\] or .* \(3, 4\)"),
        ({"x": torch.zeros(1, 3, 0, 4)}, ValueError, "not empty"),
        ({"x": torch.zeros(1, 3, 4, 9).mT}, ValueError, r"unit stride.*pass x\.contiguous"),
        ({"x": torch.zeros(1, 3, 9, 4, dtype=torch.complex128)}, TypeError, "complex128"),
        ({"order": torch.zeros(9)}, TypeError, "int32 or int64, got torch.float32"),
        ({"order": torch.zeros(2, 9, dtype=torch.int64)}, ValueError, r"\[3, S'\].*\(2, 9\)"),
        ({"order": torch.zeros(0, dtype=torch.int64)}, ValueError, "not empty"),
        ({"order": torch.zeros(9, dtype=torch.int64, device="meta")}, ValueError, "on cpu like x"),
        ({"backend": "cuda"}, ValueError, "'triton', 'torch'.*'cuda'"),
        ({"x": torch.zeros(1, 3, 9, 4, requires_grad=True)}, RuntimeError, "no backward"),
    ],
)
def test_wrong_calls_are_refused(change, error, message):
    call = {"x": torch.zeros(1, 3, 9, 4), "order": torch.arange(9), "backend": None} | change
    with pytest.raises(error, match=message):
        reorder(call["x"], call["order"], backend=call["backend"])


def test_default_backend(device):
    x, order = rows_of(device), order_of(device)
    best = BACKENDS["triton" if device.type == "cuda" else "torch"]
    assert choose(BACKENDS, None, x, order).__name__ == best


def test_triton_says_why_not_and_is_not_imported_unasked():
    """In a process of its own, where Triton compiles and finds no tensor on a GPU."""
    code = (
        "import sys, torch; sys.modules.pop('triton', None);"
        "from vdit_sparse.kernels.reorder import reorder;"
        "x, order = torch.zeros(1, 1, 2, 4), torch.arange(2);"
        "reorder(x, order); assert 'triton' not in sys.modules\n"
        "try:\n    reorder(x, order, backend='triton')\n"
        "except ValueError as error:\n    print(error)"
    )
    command = ["env", "-u", "TRITON_INTERPRET", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert "needs a CUDA or ROCm GPU, the tensors are on cpu" in done.stdout, done.stderr
