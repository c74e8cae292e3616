"""`pool_blocks`: every backend against means in float64."""

import pytest
import torch

from vdit_sparse.kernels.pool import BACKENDS, pool_blocks

# Each of at most 127 sums in fp32 rounds to half an ulp, and so does the division (GPUs: two ulps);
# relative to the mean of |x|. Sums in bf16 or fp16 would be off by far more.
ERROR = (127 + 4) * 2.0**-24


def expected_means(x, block, order=None, valid=None) -> torch.Tensor:
    B, H, S, D = x.shape
    order = torch.arange(S) if order is None else order.cpu()
    order = order.expand(H, -1)
    nb = -(-order.shape[1] // block)
    out = torch.zeros(B, H, nb, D, dtype=torch.float64)
    for h in range(H):
        for i in range(nb):
            end = block if valid is None else int(valid[i])
            slots = order[h, i * block : (i + 1) * block][:end]
            tokens = slots[slots >= 0]
            if len(tokens):
                out[:, h, i] = x.cpu().double()[:, h, tokens].mean(1)
    return out


def check(x, block, backend, **layout) -> torch.Tensor:
    out = pool_blocks(x, block, backend=backend, **layout)
    assert out.dtype == torch.float32 and out.device == x.device
    expected = expected_means(x, block, **layout)
    assert out.shape == expected.shape
    error = (out.double().cpu() - expected).abs()
    bound = ERROR * expected_means(x.abs(), block, **layout)
    assert (error <= bound).all(), f"off by {error.max():.1e}"
    return out


def random_order(device, S: int, slots: int, heads=None, dtype=torch.int64) -> torch.Tensor:
    """Every token once, in `slots` slots, of which the others are -1."""
    order = torch.stack([torch.randperm(slots, device=device) for _ in range(heads or 1)])
    order = torch.where(order < S, order, -1).to(dtype)
    return order if heads else order[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("S", [1, 63, 64, 256, 300])
def test_blocks_of_the_sequence(S, block, backend, device):
    check(torch.randn(2, 2, S, 16, device=device), block, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("D", [1, 40, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes_and_widths(dtype, D, backend, device):
    x = torch.randn(1, 2, 150, D, dtype=dtype, device=device)
    check(x, 128, backend)
    check(x, 64, backend, order=random_order(device, 150, 200))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [None, 3], ids=["shared", "per head"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "valid"])
def test_orders(masked, heads, backend, device):
    x = torch.randn(2, 230, 3, 24, device=device).transpose(1, 2)
    valid = torch.tensor([64, 0, 13, 70, 5], dtype=torch.int32, device=device)
    for dtype in (torch.int32, torch.int64):
        order = random_order(device, 230, 270, heads, dtype)
        check(x, 64, backend, order=order, valid=valid if masked else None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend, device):
    """A slice of fused q, k, v, a transposed order and every second entry of valid."""
    x = torch.randn(2, 230, 3, 2, 24, device=device)[:, :, 1].transpose(1, 2)
    order = torch.stack([random_order(device, 230, 270) for _ in range(2)], 1).t()
    valid = torch.tensor([64, 0, 13, 0, 64, 0, 9, 0, 5, 0], dtype=torch.int32, device=device)
    check(x, 64, backend, order=order, valid=valid[::2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_what_does_not_count_may_hold_anything(garbage, backend, device):
    x = torch.randn(1, 2, 200, 16, device=device)
    valid = torch.tensor([64, 30, 0, 8], dtype=torch.int32, device=device)
    clean = check(x, 64, backend, valid=valid)
    slots = torch.arange(200, device=device)
    x[:, :, slots % 64 >= valid[slots // 64]] = garbage
    assert torch.equal(pool_blocks(x, 64, valid=valid, backend=backend), clean)
    # Tokens that the order leaves out, token 0 among them.
    x = torch.randn(1, 2, 200, 16, device=device)
    order = torch.where(torch.rand(128, device=device) < 0.3, -1, 20)
    clean = check(x, 64, backend, order=order)
    x[:, :, :20] = garbage
    assert torch.equal(pool_blocks(x, 64, order=order, backend=backend), clean)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_without_real_tokens_are_zero(backend, device):
    x = torch.full((1, 1, 192, 8), torch.nan, device=device)
    x[:, :, 64:128] = 2
    valid = torch.tensor([0, 64, 0], dtype=torch.int32, device=device)
    assert pool_blocks(x, 64, valid=valid, backend=backend)[0, 0, :, 0].tolist() == [0, 2, 0]
    order = torch.full((192,), -1, device=device)
    order[64:128] = torch.arange(64, 128, device=device)
    assert pool_blocks(x, 64, order=order, backend=backend)[0, 0, :, 0].tolist() == [0, 2, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_are_in_fp32(backend, device):
    """In bf16 a sum of ones stops at 256, and 2049 is no fp16 number."""
    ones = torch.full((1, 1, 128, 4), 1.0078125, dtype=torch.bfloat16, device=device)
    assert (pool_blocks(ones, 128, backend=backend) == 1.0078125).all()
    large = torch.full((1, 1, 128, 4), 60000.0, dtype=torch.float16, device=device)
    assert (pool_blocks(large, 128, backend=backend) == 60000).all()


def test_chunks_do_not_change_the_result(monkeypatch, device):
    from vdit_sparse.kernels.pool import plain

    x = torch.randn(2, 2, 300, 16, device=device)
    order = random_order(device, 300, 350, 2)
    whole = pool_blocks(x, 64, order=order, backend="torch")
    for name in ("CPU_BUDGET", "DEVICE_BUDGET"):
        monkeypatch.setattr(plain, name, 40_000)
    assert torch.equal(pool_blocks(x, 64, order=order, backend="torch"), whole)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 4)}, ValueError, r"x must be \[B, H, S, D\].*\(3, 4\)"),
        ({"x": torch.zeros(1, 3, 90, 4).double()}, TypeError, "bf16 or fp32, got torch.float64"),
        ({"x": torch.zeros(1, 3, 4, 90).mT}, ValueError, "unit stride"),
        ({"block": 32}, ValueError, r"one of \(64, 128\) tokens, got 32"),
        ({"order": torch.zeros(2, 90, dtype=torch.int64)}, ValueError, r"\[3, S'\]"),
        ({"valid": torch.zeros(3, dtype=torch.int32)}, ValueError, r"int32 \[2\].*\(3,\)"),
        ({"valid": torch.zeros(2)}, ValueError, "got torch.float32"),
        ({"valid": torch.zeros(2, dtype=torch.int32, device="meta")}, ValueError, "on cpu like x"),
        ({"backend": "gather"}, ValueError, "'triton', 'torch'.*'gather'"),
        ({"x": torch.zeros(1, 3, 90, 4, requires_grad=True)}, RuntimeError, "no backward"),
    ],
)
def test_wrong_calls_are_refused(change, error, message):
    call = {"x": torch.zeros(1, 3, 90, 4), "block": 64} | change
    with pytest.raises(error, match=message):
        pool_blocks(**call)
