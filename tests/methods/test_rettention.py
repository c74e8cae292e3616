"""Re-ttention's laws: what is cached, what a sparse step makes of it, when, and how much it takes.

Numbers of the invariants are those of the method's sheet, after the paper and the authors' code.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.methods.test_rettention_bands import visible
from vdit_sparse.bands import MASKS, half_width
from vdit_sparse.grid import Grid
from vdit_sparse.method import Call
from vdit_sparse.methods.rettention import RettentionAttention

GRIDS = [Grid(3, 9, 13, 17), Grid(1, 16, 28), Grid(4, 2, 9, 5)]
EXACT = {"dense_steps": 0, "ramp": 0, "block": 64, "residual_dtype": "same"}
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}

each_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
each_mask = pytest.mark.parametrize("mask", MASKS)
each_ratio = pytest.mark.parametrize("ratio", ["lse", "off"])


def call_at(grid, step, memory, steps=50, layer=0, layers=2):
    return Call(grid, layer=layer, layers=layers, step=step, steps=steps, memory=memory)


def inputs(grid, device, batch=1, heads=2, dtype=torch.float32):
    return torch.randn(3, batch, heads, grid.tokens, 16, device=device, dtype=dtype)


def keep_of(method, grid, device):
    """Which key each query sees at a sparse step, bool `[S, S]`."""
    if method.mask == "token":
        place = torch.arange(grid.video, device=device) % grid.frame_tokens
        half = half_width(grid, method.density)
        keep = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool, device=device)
        keep[: grid.video, : grid.video] = (place[:, None] - place).abs() <= half
        return keep
    q = torch.zeros(1, 1, grid.tokens, 8, device=device)
    return visible(method.plan(q, q, call_at(grid, 0, {})), grid.tokens)


def exact(q, k, v, keep=None):
    """Attention and log of the sum of exponentials in fp64."""
    q, k, v = (x.double() for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if keep is not None:
        scores = scores.masked_fill(~keep, -math.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def cached(method, grid, tensors):
    """The memory after a cache step at step 0, and that step's output."""
    memory = {}
    return memory, method(*tensors, call_at(grid, 0, memory))


@each_grid
@each_mask
@each_ratio
def test_cache_step_is_dense_and_so_is_the_next_one_with_the_same_inputs(grid, mask, ratio, device):
    method = RettentionAttention(mask=mask, ratio=ratio, **EXACT)
    tensors = inputs(grid, device)
    memory, out = cached(method, grid, tensors)
    dense = exact(*tensors)[0].float()
    torch.testing.assert_close(out, dense, **TOLERANCE)
    for step in (1, 2, 4):
        call = call_at(grid, step, memory)
        torch.testing.assert_close(method(*tensors, call), dense, **TOLERANCE)
        assert 0 < float(call.note.density) <= 1 and not call.note.searched
    assert not keep_of(method, grid, device).all() or grid.frame_tokens < 64


@each_grid
@each_mask
def test_sparse_step_is_the_scaled_band_and_the_residual(grid, mask, device):
    method = RettentionAttention(mask=mask, **{**EXACT, "ramp": 0.04})
    old, new = inputs(grid, device), inputs(grid, device)
    memory, _ = cached(method, grid, old)
    keep = keep_of(method, grid, device)
    (full, full_lse), (band, band_lse) = exact(*old), exact(*old, keep)
    rho = (band_lse - full_lse).exp()
    for step in (1, 3):
        scaled = (rho + (step - 1) * 0.04).clamp(max=1)[..., None] * exact(*new, keep)[0]
        expected = scaled + full - rho[..., None] * band
        out = method(*new, call_at(grid, step, memory))
        torch.testing.assert_close(out, expected.float(), **TOLERANCE)


@each_grid
@each_mask
def test_rho_is_the_kept_share_of_the_softmax_and_the_residual_what_is_dropped(grid, mask, device):
    method = RettentionAttention(mask=mask, **EXACT)
    q, k, v = inputs(grid, device)
    memory, _ = cached(method, grid, (q, k, v))
    keep = keep_of(method, grid, device)
    weights = (q.double() @ k.double().transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    torch.testing.assert_close(memory["rho"], (weights * keep).sum(-1).float(), **TOLERANCE)
    dropped = ((weights * ~keep) @ v.double()).float()
    torch.testing.assert_close(memory["residual"].load(q.device), dropped, **TOLERANCE)
    assert memory["rho"].dtype == torch.float32
    assert ((memory["rho"] > 0) & (memory["rho"] <= 1)).all()
    whole = keep.all(-1)
    torch.testing.assert_close(memory["rho"][..., whole], torch.ones_like(q)[..., whole, 0])
    assert (memory["rho"][..., ~whole] < 1 - 1e-4).all()


def test_ratio_off_keeps_the_difference_to_the_plain_band(device):
    grid = GRIDS[0]
    method = RettentionAttention(ratio="off", **{**EXACT, "ramp": 0.5})
    old, new = inputs(grid, device), inputs(grid, device)
    memory, _ = cached(method, grid, old)
    assert "rho" not in memory
    keep = keep_of(method, grid, device)
    residual = exact(*old)[0] - exact(*old, keep)[0]
    out = method(*new, call_at(grid, 3, memory))
    torch.testing.assert_close(out, (exact(*new, keep)[0] + residual).float(), **TOLERANCE)


def test_ramp_adds_the_band_by_steps_and_clamp_bounds_it(device):
    grid = GRIDS[0]
    tensors = inputs(grid, device)
    free = RettentionAttention(**{**EXACT, "ramp": 0.3}, clamp=False)
    bound = RettentionAttention(**{**EXACT, "ramp": 0.3}, clamp=True)
    memory, dense = cached(free, grid, tensors)
    band, _ = exact(*tensors, keep_of(free, grid, device))
    # Step 3 follows step 1 where a cache of whole steps skips step 2.
    for step, j in ((1, 0), (3, 2), (4, 3)):
        gain = free(*tensors, call_at(grid, step, memory)) - dense
        torch.testing.assert_close(gain, (j * 0.3 * band).float(), **TOLERANCE)
        room = torch.clamp(1 - memory["rho"], max=j * 0.3)[..., None]
        gain = bound(*tensors, call_at(grid, step, memory)) - dense
        torch.testing.assert_close(gain, (room * band).float(), **TOLERANCE)


def test_second_call_at_the_step_of_the_cache_takes_nothing_off(device):
    grid = GRIDS[0]
    tensors = inputs(grid, device)
    method = RettentionAttention(**{**EXACT, "ramp": 0.3})
    memory, dense = cached(method, grid, tensors)
    torch.testing.assert_close(method(*tensors, call_at(grid, 0, memory)), dense, **TOLERANCE)


@pytest.mark.parametrize(
    ("steps", "warmup", "caches"),
    [
        (20, 5, [5, 10, 15]),
        (50, 10, [10, 15, 20, 25, 30, 35, 40, 45]),
        (50, 15, [15, 20, 25, 30, 35, 40, 45]),
    ],
)
def test_schedule_is_the_published_one(steps, warmup, caches, device):
    grid = Grid(1, 16, 16)
    method = RettentionAttention(dense_steps=warmup, block=64)
    tensors = inputs(grid, device, heads=1)
    memory, kinds = {}, {"dense": [], "cache": [], "sparse": []}
    for step in range(steps):
        call = call_at(grid, step, memory, steps)
        method(*tensors, call)
        kind = "dense" if method.is_dense(call) else "cache" if call.note.searched else "sparse"
        kinds[kind].append(step)
        expected = {"dense": None, "cache": 1.0}
        assert kind == "sparse" or call.note.density == expected[kind]
        assert kind != "sparse" or call.note.density < 1
    assert kinds["dense"] == list(range(warmup)) and kinds["cache"] == caches
    full = set(range(warmup)) | {step for step in range(warmup, steps) if step % 5 == 0}
    assert kinds["sparse"] == [step for step in range(steps) if step not in full]
    assert len(kinds["sparse"]) == {(20, 5): 12, (50, 10): 32, (50, 15): 28}[steps, warmup]


def test_defaults_cache_at_the_first_sparse_step_even_if_it_is_no_multiple():
    method = RettentionAttention()
    memory = {"built": 12}
    assert method.is_dense(call_at(GRIDS[0], 11, {})) and method.is_due(call_at(GRIDS[0], 12, {}))
    due = [step for step in range(13, 18) if method.is_due(call_at(GRIDS[0], step, memory))]
    assert due == [17]


@pytest.mark.parametrize(("refresh", "searched"), [("once", [0]), ((0, 2), [0, 2])])
def test_refresh_says_when_to_cache(refresh, searched, device):
    method = RettentionAttention(**EXACT, refresh=refresh)
    memory, calls = {}, []
    for step in range(4):
        calls.append(call_at(GRIDS[0], step, memory))
        method(*inputs(GRIDS[0], device), calls[-1])
    assert [call.step for call in calls if call.note.searched] == searched


def test_refresh_each_is_dense_and_keeps_nothing(device):
    method = RettentionAttention(**EXACT, refresh="each")
    tensors = inputs(GRIDS[0], device)
    call = call_at(GRIDS[0], 3, {})
    torch.testing.assert_close(method(*tensors, call), exact(*tensors)[0].float(), **TOLERANCE)
    assert call.note.density == 1 and not call.note.searched and not call.memory


def test_runs_and_branches_do_not_see_each_other(device):
    grid = GRIDS[0]
    method = RettentionAttention(dense_steps=0, block=64)
    first, second = inputs(grid, device, batch=2), inputs(grid, device, batch=2)
    together, apart = {}, [{}, {}]
    for step, tensors in enumerate((first, second)):
        both = method(*tensors, call_at(grid, step, together))
        rows = [
            method(*(x[row : row + 1] for x in tensors), call_at(grid, step, apart[row]))
            for row in (0, 1)
        ]
        torch.testing.assert_close(both, torch.cat(rows), **TOLERANCE)
    again = {}
    method(*first, call_at(grid, 0, again))
    assert torch.equal(method(*second, call_at(grid, 1, again)), both)


def test_planted_band_is_found_and_what_drifts_outside_of_it_is_not(device):
    """Queries that look at their own place: the band alone is the output, the residual next to
    nothing; and with keys that change outside of the band the cached part is what stays old."""
    grid = Grid(2, 16, 16)
    method = RettentionAttention(mask="token", **EXACT)
    places = F.one_hot(torch.arange(grid.video, device=device) % 256, 256).float()
    q = k = 60 * places[None, None]
    v = torch.randn(1, 1, grid.video, 256, device=device)
    memory, _ = cached(method, grid, (q, k, v))
    assert (memory["rho"] > 0.99).all()
    assert memory["residual"].values.abs().max() < 0.05
    other = torch.randn_like(v)
    out = method(q, k, other, call_at(grid, 1, memory))
    torch.testing.assert_close(out, exact(q, k, other)[0].float(), atol=0.1, rtol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"density": 0}, "density must be"),
        ({"density": 1.5}, "density must be"),
        ({"mask": "band"}, r"mask must be one of \('block', 'token', 'tile'\), got 'band'"),
        ({"ratio": "on"}, "ratio must be one of"),
        ({"ramp": -0.1}, "ramp must be a finite number of at least 0, got -0.1"),
        ({"ramp": math.inf}, "ramp must be"),
        ({"clamp": 1}, "clamp must be True or False, got 1"),
        ({"offload": "cpu"}, "offload must be True or False"),
        ({"residual_dtype": "fp4"}, "residual_dtype must be one of"),
        ({"mask": "token", "backend": "gather"}, "plain torch: leave backend and precision out"),
    ],
)
def test_fields_out_of_range_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        RettentionAttention(**fields)
