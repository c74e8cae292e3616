"""AdaSpa in the course of a run: when it searches, what the calls output, what is remembered."""

import pytest
import torch
import torch.nn.functional as F

from tests.methods.adaspa_cases import PLAIN, TOLERANCE, VIDEO, call_at, inputs, same
from vdit_sparse.grid import Grid
from vdit_sparse.kernels.block_mass import block_mass
from vdit_sparse.methods.adaspa import AdaSpaAttention


def run(method, steps, device, grid=VIDEO):
    """The calls of one layer at these steps, each on its own q, k, v: (call, q, k, v, out)."""
    memory, calls = {}, []
    for step in steps:
        q, k, v = inputs(grid, device, batch=1)
        call = call_at(grid, step, memory)
        calls.append((call, q, k, v, method(q, k, v, call)))
    return calls


def test_schedule_of_a_run(device):
    calls = run(AdaSpaAttention(), range(50), device, Grid(10, 8, 8))
    searched = [call.step for call, *_ in calls if call.note.searched]
    assert searched == [10, 30]
    density = [call.note.density and float(call.note.density) for call, *_ in calls]
    assert density[:11] == [None] * 10 + [1.0]
    assert all(x == pytest.approx(0.2, abs=0.05) for x in density[11:])
    assert set(calls[0][0].memory) == {"lse", "plan", "built"}


def test_first_search_outputs_its_dense_pass_and_keeps_the_lse(device):
    ((call, q, k, v, out),) = run(AdaSpaAttention(), [10], device)
    scores = q.double() @ k.double().transpose(-1, -2) / 4
    torch.testing.assert_close(out, (scores.softmax(-1) @ v.double()).float(), **TOLERANCE)
    torch.testing.assert_close(call.memory["lse"], scores.logsumexp(-1).float(), **TOLERANCE)


def test_between_searches_the_same_plan_runs(device):
    calls = run(AdaSpaAttention(head_adaptive=False), [10, 11], device)
    call, q, k, v, out = calls[1]
    plan = calls[0][0].memory["plan"]
    assert call.memory["plan"] is plan
    assert same(plan, PLAIN.plan(*calls[0][1:3], call_at()))
    seen = plan.mask.token_mask(VIDEO.tokens, VIDEO.tokens)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=seen)
    torch.testing.assert_close(out, expected.float(), **TOLERANCE)
    assert not call.note.searched and float(call.note.density) == pytest.approx(0.2)


def test_later_search_scores_with_the_first_lse_and_runs_sparse(device):
    method = AdaSpaAttention(refresh=(10, 11), head_adaptive=False, per="head")
    calls = run(method, [10, 11], device)
    call, q, k, v, out = calls[1]
    lse = torch.logsumexp(calls[0][1] @ calls[0][2].transpose(-1, -2) / 4, -1)
    torch.testing.assert_close(call.memory["lse"], lse, **TOLERANCE)
    mass = block_mass(q, k, lse, 64, backend="reference")
    mass = mass.scatter(-1, mass.argmax(-1, keepdim=True), torch.inf).flatten(2)
    wanted = mass >= mass.sort(-1, descending=True).values[..., 79:80]
    mask = call.memory["plan"].mask
    assert torch.equal(mask.keep().flatten(2), wanted)
    seen = mask.token_mask(VIDEO.tokens, VIDEO.tokens)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=seen)
    torch.testing.assert_close(out, expected.float(), **TOLERANCE)
    assert call.note.searched and float(call.note.density) == pytest.approx(0.2)


def test_search_with_the_lse_of_the_same_q_and_k_finds_the_same(device):
    q, k, v = inputs(VIDEO, device)
    method = AdaSpaAttention(refresh="each")
    memory = {}
    first = method.plan(q, k, call_at(memory=memory))
    assert same(first, method.plan(q, k, call_at(memory=memory)))
    memory["lse"] = memory["lse"] + 1.5
    assert same(first, method.plan(q, k, call_at(memory=memory)))


@pytest.mark.parametrize(
    "fields, densities",
    [
        ({}, [1.0, 0.2, 0.2]),
        ({"dense_search": False}, [0.2, 0.2, 0.2]),
        ({"cache_lse": False}, [1.0, 1.0, 1.0]),
        ({"cache_lse": False, "dense_search": False}, [0.2, 0.2, 0.2]),
    ],
)
def test_refresh_each_searches_in_each_call(fields, densities, device):
    method = AdaSpaAttention(refresh="each", head_adaptive=False, **fields)
    calls = run(method, [10, 11, 12], device)
    assert all(call.note.searched for call, *_ in calls)
    assert [float(call.note.density) for call, *_ in calls] == pytest.approx(densities)
    assert set(calls[0][0].memory) == ({"lse"} if method.cache_lse else set())


def test_refresh_once_keeps_no_lse(device):
    calls = run(AdaSpaAttention(refresh="once"), [10, 11, 40], device)
    assert [call.note.searched for call, *_ in calls] == [True, False, False]
    assert set(calls[0][0].memory) == {"built", "plan"}


def test_branches_share_nothing(device):
    method = AdaSpaAttention(refresh=(0,), dense_steps=0)
    memories = {}, {}
    for memory in memories:
        q, k, v = inputs(VIDEO, device)
        method(q, k, v, call_at(memory=memory))
    assert not same(*(memory["plan"] for memory in memories))
    assert not torch.equal(*(memory["lse"] for memory in memories))


class Watch:
    """Counts what is timed."""

    def __init__(self):
        self.running = 0

    def start(self, device):
        self.running += 1

    def stop(self, started):
        self.running -= 1
        return "timed"


@pytest.mark.parametrize("dense_search", [True, False])
def test_planning_is_timed_at_searches_only(dense_search, device):
    method = AdaSpaAttention(dense_search=dense_search, refresh=(10, 12))
    memory = {}
    for step, plans in ((10, 1), (11, 0), (12, 1)):
        call = call_at(step=step, memory=memory)
        call.note.watch = Watch()
        method(*inputs(VIDEO, device), call)
        assert len(call.note.plans) == plans and call.note.watch.running == 0


def test_works_under_inference_mode_and_after_it(device):
    grid = Grid(3, 8, 16, 9)
    with torch.inference_mode():
        first = PLAIN(*inputs(grid, device), call_at(grid))
    assert torch.isfinite(first).all()
    with torch.no_grad():
        assert torch.isfinite(PLAIN(*inputs(grid, device), call_at(grid))).all()
