"""The base class of the methods: when it runs dense, when it rebuilds a plan, how it runs one."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from vdit_sparse.grid import Grid
from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.method import Call, Plan, SparseAttention, execute

GRID = Grid(2, 8, 16, 5)
BLOCKS = 3


@dataclass(frozen=True, kw_only=True)
class DiagonalAttention(SparseAttention):
    """Each block sees itself; writes down at which steps it was asked for a plan."""

    def plan(self, q, k, call):
        call.memory.setdefault("asked", []).append(call.step)
        return Plan(BlockMask.from_keep(torch.eye(BLOCKS, dtype=torch.bool), self.block))


@dataclass(frozen=True, kw_only=True)
class AllAttention(SparseAttention):
    """Every block sees every block."""

    def plan(self, q, k, call):
        return Plan(BlockMask.full(call.grid.tokens, block=self.block, device=q.device))


def call_at(step=0, layer=0, steps=None, layers=4, memory=None):
    return Call(GRID, layer, layers, step, steps, {} if memory is None else memory)


def inputs(tokens=GRID.tokens):
    return torch.randn(3, 1, 2, tokens, 16)


# Grid


def test_grid_counts_tokens():
    assert GRID.frame_tokens == 128
    assert GRID.video == 256
    assert GRID.tokens == 261
    assert Grid(1, 1, 1).tokens == 1


@pytest.mark.parametrize("sizes", [(0, 8, 8), (1, 0, 8), (1, 8, 0), (1, 8, 8, -1), (-1, 8, 8)])
def test_grid_without_tokens_raises(sizes):
    with pytest.raises(ValueError, match="at least one frame, row and column"):
        Grid(*sizes)


# Dense or sparse


@pytest.mark.parametrize(
    "fields, dense_places",
    [
        ({}, []),
        ({"dense_steps": 2}, [(s, y) for s in (0, 1) for y in range(4)]),
        ({"last_dense_steps": 1}, [(5, y) for y in range(4)]),
        ({"dense_layers": 1}, [(s, 0) for s in range(6)]),
        ({"last_dense_layers": 2}, [(s, y) for s in range(6) for y in (2, 3)]),
        (
            {"dense_steps": 1, "last_dense_layers": 1},
            [(0, 0), (0, 1), (0, 2), *((s, 3) for s in range(6))],
        ),
        ({"dense_steps": 99}, [(s, y) for s in range(6) for y in range(4)]),
    ],
)
def test_dense_fields(fields, dense_places):
    method = DiagonalAttention(**fields)
    places = [(step, layer) for step in range(6) for layer in range(4)]
    found = [(s, y) for s, y in places if method.is_dense(call_at(s, y, steps=6))]
    assert sorted(found) == sorted(dense_places)


def test_dense_call_runs_the_given_dense_attention_and_builds_no_plan():
    q, k, v = inputs()
    call = call_at(step=0)
    method = DiagonalAttention(dense_steps=1)
    assert torch.equal(method(q, k, v, call), F.scaled_dot_product_attention(q, k, v))
    assert method(q, k, v, call, lambda q, k, v: q + v).equal(q + v)
    assert call.memory == {}


def test_sparse_call_does_not_run_the_given_dense_attention():
    q, k, v = inputs()
    call = call_at()
    out = DiagonalAttention()(q, k, v, call, lambda *_: pytest.fail("ran dense"))
    assert not torch.allclose(out, F.scaled_dot_product_attention(q, k, v))
    assert float(call.note.density) == pytest.approx(1 / BLOCKS)


def test_last_dense_steps_needs_the_number_of_steps():
    method = DiagonalAttention(last_dense_steps=1)
    with pytest.raises(ValueError, match="last_dense_steps=1 needs the number of denoising steps"):
        method(*inputs(), call_at(steps=None))
    assert DiagonalAttention(dense_steps=1).is_dense(call_at(steps=None))


# Refresh


@pytest.mark.parametrize(
    "fields, steps, asked",
    [
        ({"refresh": "each"}, range(4), [0, 1, 2, 3]),
        ({"refresh": "once"}, range(6), [0]),
        ({"refresh": "once", "dense_steps": 2}, range(6), [2]),
        ({"refresh": 1}, range(3), [0, 1, 2]),
        ({"refresh": 3}, range(10), [0, 3, 6, 9]),
        ({"refresh": 3, "dense_steps": 2}, range(10), [2, 5, 8]),
        ({"refresh": 3}, [0, 1, 5, 6, 9], [0, 5, 9]),
        ({"refresh": (0, 4, 7)}, range(10), [0, 4, 7]),
        ({"refresh": (4, 7)}, range(10), [0, 4, 7]),
        ({"refresh": (0, 4, 7), "dense_steps": 2}, range(10), [2, 4, 7]),
        ({"refresh": (4, 5, 7)}, [0, 3, 6, 8, 9], [0, 6, 8]),
        ({"refresh": ()}, range(4), [0]),
    ],
    ids=str,
)
def test_refresh(fields, steps, asked):
    method, memory = DiagonalAttention(**fields), {}
    q, k, v = inputs()
    for step in steps:
        method(q, k, v, call_at(step, memory=memory))
    assert memory["asked"] == asked


def test_each_refresh_asks_at_every_call_of_a_step():
    method, memory = DiagonalAttention(), {}
    for _ in range(2):
        method(*inputs(), call_at(memory=memory))
    assert memory["asked"] == [0, 0]


def test_cached_plan_is_the_same_object_until_memory_is_emptied():
    method, memory = DiagonalAttention(refresh="once"), {}
    q, k, _ = inputs()
    first = method.current_plan(q, k, call_at(0, memory=memory))
    assert method.current_plan(q, k, call_at(3, memory=memory)) is first
    memory.clear()
    assert method.current_plan(q, k, call_at(0, memory=memory)) is not first


# Fields and inputs


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"dense_steps": -1},
            "dense_steps must be an integer .*, got -1",
        ),
        ({"last_dense_steps": 1.5}, "last_dense_steps must be an integer"),
        ({"dense_layers": True}, "dense_layers must be an integer"),
        ({"last_dense_layers": "2"}, "last_dense_layers must be an integer"),
        ({"block": 96}, r"block must be one of \(64, 128\) tokens, got 96"),
        ({"refresh": "never"}, "refresh must be"),
        ({"refresh": 0}, "refresh must be"),
        ({"refresh": True}, "refresh must be"),
        ({"refresh": 2.0}, "refresh must be"),
        ({"refresh": (3, -1)}, "refresh must be"),
        ({"refresh": (3, "x")}, "refresh must be"),
        ({"refresh": None}, "refresh must be"),
    ],
)
def test_fields_out_of_range_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        DiagonalAttention(**fields)


def test_refresh_list_is_kept_as_a_tuple():
    assert DiagonalAttention(refresh=[0, 3]) == DiagonalAttention(refresh=(0, 3))
    assert hash(DiagonalAttention(refresh=[0, 3])) == hash(DiagonalAttention(refresh=(0, 3)))


def test_tiles_of_small_weights_are_skipped_if_asked():
    q, k, v = inputs()
    # The last block weighs little against the ones before it.
    k[..., 128:, :] = -8 * q[..., :1, :]
    q[:] = q[..., :1, :]
    near, far = (
        AllAttention(backend="reference", skip_threshold=threshold)(q, k, v, call_at())
        for threshold in (1e-30, 0.5)
    )
    exact = AllAttention(backend="reference")(q, k, v, call_at())
    torch.testing.assert_close(near, exact, atol=1e-6, rtol=1e-6)
    expected = F.scaled_dot_product_attention(q, k[..., :128, :], v[..., :128, :])
    torch.testing.assert_close(far, expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="leave one out"):
        DiagonalAttention(precision="int8_bf16", skip_threshold=0.1)
    with pytest.raises(ValueError, match="skip_threshold must be"):
        DiagonalAttention(skip_threshold=1.5)


def test_positional_fields_raise():
    with pytest.raises(TypeError):
        DiagonalAttention(3)


def test_a_method_without_plan_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        SparseAttention()


def test_explicit_backend_runs_or_raises():
    q, k, v = inputs()
    outs = [DiagonalAttention(backend=b)(q, k, v, call_at()) for b in ("reference", "gather")]
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="abacus"):
        DiagonalAttention(backend="abacus")(q, k, v, call_at())


# Orders


def attention(q, k, v, visible):
    """Masked attention and its LSE in float64, rounded to float32."""
    q, k, v = q.double(), k.double(), v.double()
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1).nan_to_num() @ v).float(), scores.logsumexp(-1).float()


def padded_order(tokens, regions, block):
    """A random order in blocks of which each holds up to `regions` tokens, the rest masked slots;
    and the number of tokens in each block."""
    order, valid = [], []
    for part in torch.randperm(tokens).split(regions):
        order.append(F.pad(part, (0, block - len(part)), value=-1))
        valid.append(len(part))
    return torch.cat(order), torch.tensor(valid, dtype=torch.int32)


def check_against_dense(order, mask, tokens, heads=2):
    """`execute` equals dense attention over what each token's new place may see."""
    q, k, v = torch.randn(3, 2, heads, tokens, 16)
    slots = order.shape[-1]
    seen = mask.token_mask(slots, slots).expand(-1, heads, -1, -1)
    order_of_head = order.expand(heads, -1)
    visible = torch.zeros(heads, tokens, tokens, dtype=torch.bool)
    for head in range(heads):
        place = torch.stack([(order_of_head[head] == t).nonzero()[0, 0] for t in range(tokens)])
        visible[head] = seen[0, head][place][:, place]
    out, lse = execute(q, k, v, Plan(mask, order))
    expected_out, expected_lse = attention(q, k, v, visible)
    assert out.shape == q.shape
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out, expected_out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [256, 200])
def test_execute_with_one_order_for_all_heads(tokens):
    keep = torch.rand(2, -(-tokens // 64), -(-tokens // 64)) < 0.5
    check_against_dense(torch.randperm(tokens), BlockMask.from_keep(keep, 64), tokens)


def test_execute_with_an_order_for_each_head():
    order = torch.stack([torch.randperm(200) for _ in range(2)])
    check_against_dense(order, BlockMask.from_keep(torch.rand(2, 4, 4) < 0.5, 64), 200)


def test_execute_with_masked_slots():
    order, valid = padded_order(170, 50, 64)
    keep = torch.rand(2, 4, 4) < 0.6
    check_against_dense(order, BlockMask.from_keep(keep, 64, valid=valid), 170)


def test_execute_with_masked_slots_and_an_order_for_each_head():
    orders, valids = zip(*(padded_order(170, 50, 64) for _ in range(2)), strict=True)
    mask = BlockMask.from_keep(torch.rand(2, 4, 4) < 0.6, 64, valid=valids[0])
    check_against_dense(torch.stack(orders), mask, 170)


def test_execute_with_rows_without_keys():
    keep = torch.eye(4, dtype=torch.bool)
    keep[1] = False
    order = torch.randperm(256)
    q, k, v = torch.randn(3, 1, 2, 256, 16)
    out, lse = execute(q, k, v, Plan(BlockMask.from_keep(keep, 64), order))
    without = order[64:128]
    assert (out[:, :, without] == 0).all()
    assert (lse[:, :, without] == -torch.inf).all()
    assert lse.isfinite().sum() == 2 * 192


def test_execute_without_an_order_equals_the_identity():
    q, k, v = inputs()
    mask = BlockMask.from_keep(torch.rand(BLOCKS, BLOCKS) < 0.7, 128)
    plain, ordered = (
        execute(q, k, v, Plan(mask, order)) for order in (None, torch.arange(GRID.tokens))
    )
    assert torch.equal(plain[0], ordered[0])
    assert torch.equal(plain[1], ordered[1])
