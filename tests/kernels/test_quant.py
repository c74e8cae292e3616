"""Quantisation of q, k and v: both backends against what the formats promise, and each other."""

import pytest
import torch

from vdit_sparse.kernels.quant import (
    BACKENDS,
    Quantized,
    channels_of,
    quantize_values,
    reference,
    rotate,
    smooth_quantize,
)

pytest_plugins = ["tests.kernels.float8"]
pytestmark = pytest.mark.usefixtures("float8")
# (B, H, tokens, D), block; the last has a ragged block and channels that are no power of two.
SHAPES = {"whole": ((1, 2, 256, 64), 128), "ragged": ((2, 2, 150, 72), 64)}
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_shape = pytest.mark.parametrize(("shape", "block"), SHAPES.values(), ids=SHAPES)


def normal(shape, device, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(device, dtype)


@pytest.mark.parametrize("D", [16, 64, 72, 96, 128, 256])
def test_rotation_keeps_products_and_spreads_what_is_alike(D):
    x, y = normal((5, D), "cpu", torch.float64), normal((3, D), "cpu", torch.float64)
    torch.testing.assert_close(rotate(x) @ rotate(y).T, x @ y.T, rtol=0, atol=1e-12)
    channels = channels_of(D)
    assert channels == {16: 16, 64: 64, 72: 1, 96: 16, 128: 64, 256: 1}[D]
    # One channel alone, and a constant of all: each is as large everywhere as it can be.
    one = rotate(torch.eye(D, dtype=torch.float64)[3])[:channels].abs()
    torch.testing.assert_close(one, torch.full_like(one, channels**-0.5) if channels > 1 else one)
    constant = rotate(torch.ones(D, dtype=torch.float64)).abs()
    torch.testing.assert_close(constant, torch.ones_like(constant))


def assert_int8(got: Quantized, x: torch.Tensor, block: int) -> None:
    """`got` is fp64 x `[B, H, N, D]`, rotated, to half a step of amax / 127 of its block, and zero
    past N."""
    x = rotate(x)
    padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % block))
    steps = padded.unflatten(2, (-1, block)).abs().amax((3, 4)) / 127
    assert got.values.dtype == torch.int8 and got.values.shape == padded.shape
    assert got.scale.dtype == torch.float32
    torch.testing.assert_close(got.scale.double(), steps, rtol=1e-6, atol=1e-30)
    error = (got.dequantize().double() - padded).abs().unflatten(2, (-1, block)).amax((3, 4))
    assert (error <= steps * 0.5001).all()
    assert not got.values[:, :, x.shape[2] :].any()


@each_backend
@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_queries_and_smoothed_keys(shape, block, dtype, backend, device):
    q, k = normal(shape, device, dtype), normal(shape, device, dtype) + 3
    pair = smooth_quantize(q, k, block, block, backend=backend)
    mean = k[:, :, reference.sampled(shape[2], k.device)].double().mean(2)
    torch.testing.assert_close(pair.mean.double(), mean, rtol=1e-5, atol=1e-6)
    balance = pair.balance.double()[:, :, None]
    assert_int8(pair.q, q.double() * balance, block)
    assert_int8(pair.k, (k.double() - pair.mean.double()[:, :, None]) / balance, block)
    shift = (q.double() @ mean[..., None]).squeeze(-1)
    torch.testing.assert_close(pair.shift.double(), shift, rtol=1e-4, atol=1e-4)


@each_backend
@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values(shape, block, dtype, backend, device):
    v = normal(shape, device, dtype)
    got = quantize_values(v, block, backend=backend)
    exact, N = v.double().transpose(2, 3), shape[2]
    assert got.values.dtype == torch.float8_e4m3fn
    assert got.values.shape == (*shape[:2], shape[3], -(-N // block) * block)
    torch.testing.assert_close(got.scale.double(), exact.abs().amax(3) / 448, rtol=1e-6, atol=0)
    error = (got.dequantize()[..., :N].double() - exact).abs()
    # Half an ulp: 2^-4 of a normal number, 2^-10 steps of a subnormal one.
    assert (error <= (exact.abs() * 2.0**-4).maximum(got.scale[..., None] * 2.0**-10) * 1.001).all()
    assert not got.values.float()[..., N:].any()


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rotated_numbers_of_triton(dtype, D, device):
    """Sums in another order can move a number over a tie, and no further."""
    q, k = normal((1, 2, 150, D), device, dtype), normal((1, 2, 150, D), device, dtype) + 10
    real = torch.rand(1, 150, device=device) < 0.7
    pairs = [smooth_quantize(q, k, 64, 64, real=real, backend=each) for each in BACKENDS]
    for name in ("q", "k"):
        ours, expected = (getattr(pair, name) for pair in pairs)
        torch.testing.assert_close(ours.scale, expected.scale, rtol=1e-5, atol=0)
        off = (ours.values.int() - expected.values.int()).abs()
        assert off.max() <= 1 and (off != 0).double().mean() < 5e-3


@pytest.mark.parametrize("shape, block", [((1, 2, 256, 8), 128), SHAPES["ragged"]])
def test_triton_rounds_as_the_reference(shape, block, device):
    """Where nothing is rotated: the same bits, ties too."""
    from vdit_sparse.kernels.quant import triton

    x, mean = normal(shape, device), normal((shape[0], shape[1], shape[3]), device)
    balance = torch.randint(-3, 4, mean.shape).to(device).float().exp2()
    # Ties: halves of a step of 1, which amax = 127 makes.
    x[..., 0, :] = torch.arange(shape[3], device=device) + 0.5
    x[..., 1, 0] = 127
    real = torch.rand(shape[0], shape[2], device=device) < 0.7
    pairs = [
        (
            module.quantize_keys(x, block, mean, balance, real),
            module.quantize_queries(x, block, mean, balance)[0],
            module.quantize_channels(x, block, real),
        )
        for module in (triton, reference)
    ]
    for ours, expected in zip(*pairs, strict=True):
        assert torch.equal(ours.values.view(torch.int8), expected.values.view(torch.int8))
        assert torch.equal(ours.scale, expected.scale)


def test_sampled_tokens():
    found = reference.sampled(150, torch.device("cpu")).nonzero().flatten().tolist()
    assert found == [*range(8), *range(72, 80), *range(144, 150)]
    for tokens in range(1, 1200):
        count = reference.samples(tokens)
        assert count == reference.sampled(tokens, torch.device("cpu")).sum()
        assert count > 0 and abs(count - tokens / 8) <= 8


@each_backend
@pytest.mark.parametrize("width", [32, 45, 64, 80, 128])
def test_mean_of_rows_as_long_as_the_samples_are_apart(width, backend, device):
    """Whatever the length of an image's rows: keys that depend on their column have nearly the mean
    of all taken off."""
    column = torch.arange(24 * width, device=device) % width
    k = (column / width * 10 - 5).sin()[None, None, :, None].repeat(1, 1, 1, 16)
    got = smooth_quantize(k, k, 64, 64, backend=backend).mean
    assert (got - k.mean(2)).abs().max() < 0.25 * k.std()


@each_backend
@pytest.mark.parametrize("real", [None, "shared", "per batch row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_balance_makes_channels_equally_strong(dtype, real, backend, device):
    """By a power of two, whatever is hidden, not finite or outside of the samples."""
    powers = torch.tensor([0, 1, -2, 3, -3, 5, -9, 0.1, 0.9, 0, 0, 0, 0, 0, 0, 0], device=device)
    q, k = normal((2, 2, 300, 16), device, dtype), normal((2, 2, 300, 16), device, dtype)
    q = (q * (-powers).exp2()).to(dtype)
    k = (k * powers.exp2()).to(dtype)
    k[..., 0] += 1
    q[0, 1, 5, 3] = torch.inf
    q[..., 14], k[..., 15] = 0, 1
    unsampled = ~reference.sampled(300, k.device)
    q[:, :, unsampled], k[:, :, unsampled] = 7, 1
    if real is not None:
        real = torch.rand(2 if real != "shared" else 1, 300, device=device) < 0.7
        k = k.masked_fill(~real.expand(2, 300)[:, None, :, None], torch.nan)
    got = smooth_quantize(q, k, 64, 64, real=real, backend=backend).balance
    expected = torch.tensor([0, 1, -2, 3, -3, 3, -3, 0, 1], device=device).exp2()
    assert torch.equal(got[..., :9], expected.expand(2, 2, 9))
    assert torch.equal(got[..., 14:], torch.ones(2, 2, 2, device=device))


@each_backend
def test_an_offset_of_all_keys_costs_nothing(backend, device):
    q, k = normal((1, 2, 128, 64), device), normal((1, 2, 128, 64), device)
    offset = 10 * normal((1, 2, 1, 64), device)
    plain = smooth_quantize(q, k, 64, 64, backend=backend)
    moved = smooth_quantize(q, k + offset, 64, 64, backend=backend)
    torch.testing.assert_close(moved.k.scale, plain.k.scale, rtol=1e-4, atol=0)
    step = plain.k.scale.max()
    assert (moved.k.dequantize() - plain.k.dequantize()).abs().max() <= 1.01 * step
    assert (moved.k.values != plain.k.values).float().mean() < 1e-3


@each_backend
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e4])
@pytest.mark.parametrize("batches", [1, 2], ids=["shared", "per batch row"])
def test_keys_that_do_not_count_may_hold_anything(batches, garbage, backend, device):
    q, k, v = (normal((2, 2, 100, 32), device) for _ in range(3))
    real = torch.rand(batches, 100, device=device) < 0.5
    real[0, 64:] = False
    hidden = ~real.expand(2, 100)[:, None, :, None]
    counted = real & reference.sampled(100, real.device)
    weights = (counted / counted.sum(1, keepdim=True)).double()
    mean = (k.double() * weights[:, None, :, None]).sum(2)
    results = []
    for value in (0, garbage):
        x, y = (t.masked_fill(hidden, value) for t in (k, v))
        pair = smooth_quantize(q, x, 64, 64, real=real, backend=backend)
        values = quantize_values(y, 64, real=real, backend=backend)
        torch.testing.assert_close(pair.mean.double(), mean, rtol=1e-5, atol=1e-6)
        results.append((pair.k.values, pair.k.scale, pair.mean, values.values.float()))
    for zeros, ours in zip(*results, strict=True):
        assert torch.equal(zeros, ours)
    assert not results[1][0][:, :, :100].masked_select(hidden).any()


@each_backend
def test_a_query_that_is_not_finite_harms_no_other(backend, device):
    q, k = normal((1, 1, 64, 32), device), normal((1, 1, 64, 32), device)
    q[:, :, 5] = 0
    expected = smooth_quantize(q, k, 64, 64, backend=backend)
    q[:, :, 5] = torch.tensor([torch.nan, torch.inf], device=device).repeat(16)
    got = smooth_quantize(q, k, 64, 64, backend=backend)
    assert torch.equal(got.q.values, expected.q.values)
    assert torch.equal(got.q.scale, expected.q.scale)


@each_backend
def test_zeros_and_no_keys_at_all(backend, device):
    zeros = torch.zeros(1, 1, 64, 32, device=device)
    ones = torch.ones_like(zeros)
    nothing = torch.zeros(1, 64, dtype=torch.bool, device=device)
    for k, real in ((zeros, None), (ones, nothing)):
        pair = smooth_quantize(zeros, k, 64, 64, real=real, backend=backend)
        values = quantize_values(k, 64, real=real, backend=backend)
        for got in (pair.q, pair.k, values):
            assert not got.dequantize().any() and (got.scale > 0).all()
        assert not pair.mean.any() and not pair.shift.any()


@each_backend
def test_strides_do_not_matter(backend, device):
    q, k, v = torch.randn(2, 100, 3, 2, 32).to(device).permute(2, 0, 3, 1, 4)
    packed = [x.contiguous() for x in (q, k, v)]
    ours = smooth_quantize(q, k, 64, 64, backend=backend)
    expected = smooth_quantize(*packed[:2], 64, 64, backend=backend)
    assert torch.equal(ours.q.values, expected.q.values)
    torch.testing.assert_close(ours.k.dequantize(), expected.k.dequantize(), atol=1e-5, rtol=0)
    values = [quantize_values(x, 64, backend=backend).values.float() for x in (v, packed[2])]
    assert torch.equal(*values)


x = torch.zeros(1, 2, 8, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: smooth_quantize(x[0], x, 64, 64), ValueError, r"q must be \[B, H, tokens, D\]"),
        (lambda: smooth_quantize(x, x.double(), 64, 64), TypeError, "k must be fp16, bf16 or fp32"),
        (lambda: smooth_quantize(x, x[:, :1], 64, 64), ValueError, "must agree in B, H and D"),
        (lambda: smooth_quantize(x, x, 64, 65), ValueError, "power of two of at least 16.*65"),
        (lambda: smooth_quantize(x, x, 64, 64, backend="cuda"), ValueError, "got 'cuda'"),
        (lambda: quantize_values(x.mT, 64), ValueError, r"pass v.contiguous\(\)"),
        (
            lambda: quantize_values(x, 64, real=torch.ones(8, dtype=torch.bool)),
            ValueError,
            r"real must be bool \[1, 8\] or \[1, 8\], got torch.bool \(8,\)",
        ),
        (
            lambda: quantize_values(x, 64, real=torch.ones(1, 8, dtype=torch.bool, device="meta")),
            ValueError,
            "real must be on cpu like the keys, got meta",
        ),
    ],
)
def test_wrong_calls_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
