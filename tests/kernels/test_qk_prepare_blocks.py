"""`prepare_blocks`: one pass against the same things one after the other."""

import pytest
import torch

from tests.kernels.test_qk_prepare import EPS, tables
from vdit_sparse.kernels.pool import pool_blocks
from vdit_sparse.kernels.qk_prepare import prepare
from vdit_sparse.kernels.qk_prepare.blocks import BACKENDS, prepare_blocks
from vdit_sparse.kernels.reorder import reorder

pytest_plugins = ["tests.kernels.bfloat16"]
pytestmark = pytest.mark.usefixtures("bfloat16")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
S, H, D = 70, 2, 16


def inputs(device, dtype, across: bool):
    """Queries, keys with a common offset, weights `[H * D]` or `[D]`, tables of 60 tokens."""
    q, k = (torch.randn(1, S, H, D, device=device, dtype=dtype) for _ in range(2))
    weights = tuple(torch.rand(H * D if across else D, device=device).to(dtype) + 1 for _ in "qk")
    return q, k + 2, weights, tables(60, D, device)


def order_of(kind: str, device):
    """None, or every token once among 130 slots, or the same for each head apart."""
    if kind == "none":
        return None
    orders = torch.stack([torch.randperm(130, device=device) for _ in range(H)])
    orders = torch.where(orders < S, orders, -1)
    return orders[0] if kind == "shared" else orders


def ordered(rows, order):
    """`[B, H, S', D]` of rows `[B, S, H, D]`."""
    rows = rows.transpose(1, 2)
    return rows if order is None else reorder(rows, order)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("across", [True, False], ids=["all heads", "each head"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["none", "shared", "per head"])
def test_rows_and_means(kind, dtype, across, backend, device):
    q, _, weights, rotary = inputs(device, dtype, across)
    order, given = order_of(kind, device), {"eps": EPS, "round_first": not across}
    rows, means = prepare_blocks(
        q, weights[0], rotary, block=64, order=order, backend=backend, **given
    )
    expected = prepare(q, weights[0], rotary, backend="reference", **given)
    assert rows.is_contiguous() and rows.dtype == dtype and means.dtype == torch.float32
    # Another order of the sums can move a rounding by a unit in the last place.
    near = {"rtol": 0, "atol": 8 * torch.finfo(dtype).eps}
    torch.testing.assert_close(rows.transpose(1, 2), ordered(expected, order), **near)
    exact = pool_blocks(expected.transpose(1, 2).contiguous(), 64, order=order)
    torch.testing.assert_close(means, exact, rtol=0, atol=near["atol"] / 8 + 1e-5)
    if order is not None:
        assert (rows.transpose(1, 2)[:, (order < 0).expand(H, -1)] == 0).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"block": 32}, ValueError, r"one of \(64, 128\) tokens, got 32"),
        ({"x": torch.zeros(1, 4, 2, 7)}, ValueError, "even D"),
        ({"order": torch.zeros(3, 4, dtype=torch.int64)}, ValueError, r"\[2, S'\]"),
        ({"weight": torch.zeros(3)}, ValueError, r"weight must be \[16\]"),
        ({"backend": "cuda"}, ValueError, "'triton', 'reference'.*'cuda'"),
        ({"x": torch.zeros(1, 4, 2, 8, requires_grad=True)}, RuntimeError, "no backward"),
    ],
)
def test_wrong_calls_are_refused(change, error, message):
    call = {"x": torch.zeros(1, 4, 2, 8), "weight": torch.zeros(8), "eps": EPS, "block": 64}
    with pytest.raises(error, match=message):
        prepare_blocks(**(call | change))
