"""What every method in METHODS promises, whatever it does: law for law of DESIGN.md."""

import json
from dataclasses import FrozenInstanceError, asdict, fields, replace

import pytest
import torch
import torch.nn.functional as F

from tests.methods.cases import CALIBRATED, EVERYTHING_KEPT, call_at, ready
from vdit_sparse.call import Note
from vdit_sparse.grid import Grid
from vdit_sparse.methods import METHODS

# Images, text, sizes that no block divides, the bundled model's clip.
GRIDS = [
    Grid(1, 16, 28),
    Grid(1, 9, 13, 17),
    Grid(9, 9, 13),
    Grid(9, 9, 13, 17),
    Grid(30, 2, 9, 17),
    Grid(7, 16, 28),
]
# A grid on which every method drops something at its defaults, and one with as many tokens.
SPARSE_GRID, SAME_LENGTH = Grid(16, 16, 16, 17), Grid(32, 16, 8, 17)

# Scores differ in the last bits between tilings; float32 throughout.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}

each_method = pytest.mark.parametrize("name", METHODS)
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
each_block = pytest.mark.parametrize("block", [64, 128])


def exact(q, k, v, mask=None):
    """Dense attention in fp64: a GPU's own fp32 kernels may round as coarsely as what is tested."""
    q, k, v = (x.double() for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).float()


def inputs(grid, device, batch=2, heads=2):
    return torch.randn(3, batch, heads, grid.tokens, 16, device=device)


def visible(plan, tokens):
    """Which key each query sees in the sequence, bool `[B|1, H|1, tokens, tokens]`."""
    if plan.order is None:
        return plan.mask.token_mask(tokens, tokens)
    slots = plan.order.shape[-1]
    mask = plan.mask.token_mask(slots, slots)
    order = plan.order if plan.order.ndim == 2 else plan.order[None]
    place = order.argsort(dim=-1, stable=True)[:, -tokens:]
    heads = max(mask.shape[1], len(place))
    mask, place = mask.expand(-1, heads, -1, -1), place.expand(heads, -1)
    return torch.stack([mask[:, h][:, place[h]][:, :, place[h]] for h in range(heads)], 1)


@each_method
@each_grid
@each_block
def test_everything_kept_equals_dense(name, grid, block, device):
    method = ready(name, block=block, **EVERYTHING_KEPT.get(name, {}))
    q, k, v = inputs(grid, device)
    calls = [call_at(name, grid, block, everything=True) for _ in range(2)]
    assert method.plan(q, k, calls[0]).mask.density() == 1
    torch.testing.assert_close(method(q, k, v, calls[1]), exact(q, k, v), **TOLERANCE)


@each_method
@each_grid
@each_block
def test_order_is_a_bijection_that_keeps_text_last(name, grid, block, device):
    q, k, _ = inputs(grid, device)
    plan = ready(name, block=block).plan(q, k, call_at(name, grid, block))
    slots = grid.tokens if plan.order is None else plan.order.shape[-1]
    assert plan.mask.nq == -(-slots // plan.mask.block_q)
    assert plan.mask.nk == -(-slots // plan.mask.block_k)
    order = torch.arange(grid.tokens)[None] if plan.order is None else plan.order.cpu()
    for positions in order.reshape(-1, slots):
        real = positions[positions >= 0]
        assert torch.equal(real.sort().values, torch.arange(grid.tokens))
        if grid.text:
            assert (real[: grid.video] < grid.video).all()


@each_method
@each_grid
@each_block
def test_every_query_has_keys_and_text_is_kept_whole(name, grid, block, device):
    q, k, _ = inputs(grid, device)
    plan = ready(name, block=block).plan(q, k, call_at(name, grid, block))
    seen = visible(plan, grid.tokens)
    assert seen.any(-1).all()
    assert seen[..., grid.video :, :].all()
    assert seen[..., grid.video :].all()


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"rettention"}))  # which adds what it cached
@each_grid
@each_block
def test_output_is_dense_attention_over_the_visible_tokens(name, grid, block, device):
    method = ready(name, block=block)
    q, k, v = inputs(grid, device)
    calls = [call_at(name, grid, block) for _ in range(2)]
    seen = visible(method.plan(q, k, calls[0]), grid.tokens)
    expected = exact(q, k, v, seen)
    torch.testing.assert_close(method(q, k, v, calls[1]), expected, **TOLERANCE)


@each_method
@each_grid
def test_batch_rows_do_not_see_each_other(name, grid, device):
    method = ready(name)
    q, k, v = inputs(grid, device)
    calls = [call_at(name, grid) for _ in range(2)]
    for step in range(2):
        both, alone = (
            method(*(x[:rows] for x in (q, k, v)), replace(call, step=step))
            for rows, call in zip((2, 1), calls, strict=True)
        )
        torch.testing.assert_close(both[:1], alone, **TOLERANCE)


@each_method
@each_grid
@each_block
def test_same_call_gives_the_same_plan(name, grid, block, device):
    q, k, _ = inputs(grid, device)
    method = ready(name, block=block)
    plans = [method.plan(q, k, call_at(name, grid, block)) for _ in range(2)]
    assert torch.equal(*(plan.mask.keep() for plan in plans))
    orders = [plan.order for plan in plans]
    assert orders == [None, None] or torch.equal(*orders)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"adaspa"}))  # which looks at q and k alone
@each_block
def test_another_grid_of_the_same_length_gives_another_plan(name, block, device):
    q, k, _ = inputs(SPARSE_GRID, device)
    method = ready(name, block=block)
    seen = [
        visible(method.plan(q, k, call_at(name, grid, block)), grid.tokens)
        for grid in (SPARSE_GRID, SAME_LENGTH)
    ]
    assert not torch.equal(*seen)


@each_method
def test_plan_drops_something_and_density_is_noted(name, device):
    q, k, v = inputs(SPARSE_GRID, device)
    call = call_at(name, SPARSE_GRID)
    method = ready(name)
    method(q, k, v, call)
    assert 0 < float(call.note.density) <= 1
    call = replace(call, step=1, note=Note())
    method(q, k, v, call)
    assert 0 < float(call.note.density) < 1


@each_method
@pytest.mark.parametrize(
    ("refresh", "built"), [("once", 1), (2, 2), ((0, 1, 3), 3), ((0.0, 0.5), 2)]
)
def test_a_plan_is_built_as_often_as_refresh_says_and_dies_with_the_memory(
    name, refresh, built, device
):
    class Counting:
        def start(self, device):
            return None

        def stop(self, started):
            marks.append(started)

    q, k, v = inputs(SPARSE_GRID, device)
    method, first = ready(name, refresh=refresh), call_at(name, SPARSE_GRID)
    for runs in (1, 2):
        marks, memory = [], dict(first.memory)
        for step in range(4):
            note = Note(watch=Counting())
            method(q, k, v, replace(first, step=step, memory=memory, note=note))
        assert len(marks) == built, runs


@each_method
def test_branches_do_not_share_state(name, device):
    grid = GRIDS[2]
    method = ready(name, refresh=3)
    branches = [inputs(grid, device) for _ in range(2)]
    alone = [_run(method, name, [branch], grid)[0] for branch in branches]
    together = _run(method, name, branches, grid)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)


def _run(method, name, branches, grid):
    """The last outputs of branches that take turns through two steps, each with its memory."""
    calls = [call_at(name, grid) for _ in branches]
    for step in range(2):
        outs = [
            method(*qkv, replace(call, step=step))
            for qkv, call in zip(branches, calls, strict=True)
        ]
    return outs


@each_method
def test_is_its_own_configuration(name):
    kind = METHODS[name]
    method = kind(dense_steps=3, refresh=(0, 5), block=64)
    assert method == kind(dense_steps=3, refresh=(0, 5), block=64)
    assert method != replace(method, dense_steps=4)
    assert len({method, replace(method), replace(method, block=128)}) == 2
    for field in fields(method):
        with pytest.raises(FrozenInstanceError):
            setattr(method, field.name, getattr(method, field.name))


@each_method
@pytest.mark.parametrize("changed", [{}, {"dense_steps": 3, "refresh": (0, 5), "block": 64}])
def test_is_rebuilt_from_its_repr_and_from_json(name, changed):
    kind = METHODS[name]
    method = kind(**changed)
    assert eval(repr(method), {kind.__name__: kind}) == method
    assert kind(**json.loads(json.dumps(asdict(method)))) == method


@each_method
def test_raises_under_autograd(name, device):
    grid = GRIDS[0]
    q, k, v = inputs(grid, device)
    k.requires_grad_()
    with pytest.raises(RuntimeError, match=r"is inference only.*torch\.no_grad"):
        ready(name)(q, k, v, call_at(name, grid))
    with torch.no_grad():
        assert ready(name)(q, k, v, call_at(name, grid)).shape == q.shape


@each_method
def test_rejects_a_sequence_that_is_not_the_grid(name, device):
    q, k, v = inputs(Grid(2, 8, 8), device)
    with pytest.raises(ValueError, match="has 192 tokens, but q has 128"):
        ready(name)(q, k, v, call_at(name, Grid(3, 8, 8)))


@pytest.mark.parametrize("name", CALIBRATED)
def test_without_a_calibration_it_says_how_to_make_one(name, device):
    grid = GRIDS[0]
    call = replace(call_at(name, grid), memory={})
    with pytest.raises(ValueError, match="needs a calibration .*vdit-sparse calibrate"):
        ready(name)(*inputs(grid, device), call)


@each_method
@pytest.mark.parametrize("precision", ["int8_bf16", "int8_fp8"])
def test_eight_bits_stay_near(name, precision, device):
    grid = Grid(4, 8, 16, 9)
    q, k, v = inputs(grid, device)
    backend = "reference" if device.type == "cpu" else None
    method = ready(name, precision=precision, backend=backend)
    plain = ready(name)
    exact_out, rounded = (m(q, k, v, call_at(name, grid)) for m in (plain, method))
    error = (rounded - exact_out).norm() / exact_out.norm()
    assert error < (0.02 if precision == "int8_bf16" else 0.05)
