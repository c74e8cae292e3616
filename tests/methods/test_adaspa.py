"""AdaSpa's own laws: what a search finds, which heads get how much, sinks, and when it searches."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vdit_sparse.grid import Grid
from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.block_mass import block_mass
from vdit_sparse.method import Call
from vdit_sparse.methods.adaspa import AdaSpaAttention

VIDEO = Grid(10, 8, 16)  # 20 blocks of 64
TEXT = Grid(9, 9, 13, 17)  # 1053 video tokens: the edge lies within block 16 of 17
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
# Searches at each step from 0 on, and shows the searched mask even in the first call.
PLAIN = AdaSpaAttention(dense_steps=0, dense_search=False, head_adaptive=False)


def call_at(grid=VIDEO, step=0, memory=None, layer=0, steps=50):
    return Call(grid, layer, 4, step, steps, {} if memory is None else memory)


def inputs(grid, device, heads=2, batch=2):
    return torch.randn(3, batch, heads, grid.tokens, 16, device=device)


def planted(targets, strength, device, block=64):
    """q and k `[1, 1, nb * block, D]` of which query block p looks at the key blocks targets[p]."""
    codes = torch.eye(max(max(t) for t in targets) + 1, device=device)[: len(targets)]
    if len(codes) < len(targets):
        codes = torch.eye(len(targets), device=device)
    looks = torch.stack([codes[list(t)].sum(0) for t in targets])
    q, k = (x.repeat_interleave(block, 0)[None, None] for x in (looks, codes))
    return q * strength * codes.shape[1] ** 0.5, k


def fresh_mass(q, k, block=64):
    lse = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).logsumexp(-1).float()
    return block_mass(q, k, lse, block, backend="reference")


def recall(mass, mask):
    return (mass * mask.keep()).sum((-2, -1)) / mass.sum((-2, -1))


def same(a, b):
    return torch.equal(a.mask.keep(), b.mask.keep())


def levels_of(plan):
    """Kept blocks of a row, by head of the first batch row."""
    return plan.mask.cnt[0, :, 0].tolist()


@pytest.mark.parametrize("per", ["row", "head"])
@pytest.mark.parametrize("grid", [VIDEO, TEXT, Grid(1, 5, 7)], ids=str)
def test_full_density_equals_dense(grid, per, device):
    q, k, v = inputs(grid, device)
    method = replace(PLAIN, density=1.0, per=per)
    assert method.plan(q, k, call_at(grid)).mask.keep().all()
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double()).float()
    torch.testing.assert_close(method(q, k, v, call_at(grid)), expected, **TOLERANCE)


@pytest.mark.parametrize("block", [64, 128])
def test_rows_keep_their_heaviest_blocks(block, device):
    q, k, _ = inputs(VIDEO, device)
    mask = replace(PLAIN, density=0.3, block=block).plan(q, k, call_at()).mask
    weights = (q.double() @ k.double().transpose(-1, -2) / 4).softmax(-1)
    mass = weights.unflatten(3, (-1, block)).unflatten(2, (-1, block)).sum((3, 5))
    count = round(0.3 * mask.nk)
    assert (mask.cnt == count).all()
    least = mass.sort(-1, descending=True).values[..., count - 1 : count]
    assert torch.equal(mask.keep(), mass >= least)


@pytest.mark.parametrize("per", ["row", "head"])
def test_planted_blocks_are_found(per, device):
    targets = [((3 * p) % 20, (7 * p + 5) % 20) for p in range(20)]
    q, k = planted(targets, 20.0, device)
    mask = replace(PLAIN, density=0.1, per=per).plan(q, k, call_at()).mask
    wanted = torch.zeros(20, 20, dtype=torch.bool, device=device)
    for p, blocks in enumerate(targets):
        wanted[p, list(blocks)] = True
    kept = mask.keep()[0, 0]
    assert not (wanted & ~kept).any()
    assert recall(fresh_mass(q, k), mask) > 0.99


def test_recall_of_a_diffuse_head_is_little_more_than_its_density(device):
    q, k, _ = inputs(VIDEO, device)
    mass = fresh_mass(q, k)
    recalls = [
        recall(mass, replace(PLAIN, density=d).plan(q, k, call_at()).mask) for d in (0.1, 0.2, 0.5)
    ]
    for density, found in zip((0.1, 0.2, 0.5), recalls, strict=True):
        assert (found > density).all() and (found < density + 0.25).all()
    assert (recalls[0] < recalls[1]).all() and (recalls[1] < recalls[2]).all()


def test_whole_map_keeps_as_many_blocks_and_more_mass(device):
    q, k, _ = inputs(VIDEO, device)
    # Rows of unequal sharpness, which is where the whole map differs from the rows.
    q = q * torch.linspace(0.1, 3, VIDEO.tokens, device=device)[:, None]
    rows, whole = (replace(PLAIN, per=per).plan(q, k, call_at()).mask for per in ("row", "head"))
    mass = fresh_mass(q, k)
    assert torch.equal(rows.cnt.sum(-1), whole.cnt.sum(-1))
    assert (recall(mass, whole) > recall(mass, rows)).all()


def test_whole_map_starves_no_row(device):
    # Key block 0 draws all the mass of rows 0 to 9; the mass of the others is spread thin.
    q, k = planted([(0,)] * 10 + [tuple(range(20))] * 10, 1.0, device)
    q[:, :, :640] *= 30
    q[:, :, 640:] = 0
    mask = replace(PLAIN, per="head", density=0.05).plan(q, k, call_at()).mask
    assert mask.cnt.sum() == 20
    assert (mask.cnt == 1).all()


def sharp_and_diffuse(device, sharp, heads=6):
    """Heads `sharp` look at one block each, the others at all alike but for noise."""
    q, k = (x.repeat(1, heads, 1, 1) for x in planted([(p,) for p in range(20)], 20.0, device))
    noise = torch.randn_like(q[:, 0])
    for head in set(range(heads)) - set(sharp):
        q[:, head] = noise * 0.1 * (head + 1)
    return q, k


@pytest.mark.parametrize("rule", ["up", "base"])
def test_sharp_heads_get_less_and_the_most_diffuse_more(rule, device):
    q, k = sharp_and_diffuse(device, (2, 5))
    method = replace(PLAIN, head_adaptive=True, recall_eval=rule)
    plan = method.plan(q, k, call_at())
    # 20 blocks: 2, 4 or 6 of them; heads 0 and 1 have the least noise.
    assert levels_of(plan) == [6, 6, 2, 4, 4, 2]
    assert plan.mask.density() == pytest.approx(0.2)


@pytest.mark.parametrize("rule", ["up", "base"])
@pytest.mark.parametrize("heads", [1, 4, 5])
def test_at_most_half_of_the_heads_get_less(rule, heads, device):
    q, k = sharp_and_diffuse(device, range(heads), heads)
    method = replace(PLAIN, head_adaptive=True, recall_eval=rule)
    levels = levels_of(method.plan(q, k, call_at()))
    assert levels.count(2) == levels.count(6) == heads // 2


def test_recall_is_asked_at_the_density_that_the_rule_names(device):
    # Four blocks of equal mass: recall 1 at 4 of 20 blocks, a half at 2.
    targets = [tuple((p + i) % 20 for i in range(4)) for p in range(20)]
    q, k = (x.repeat(1, 4, 1, 1) for x in planted(targets, 20.0, device))
    q[:, 2:] = torch.randn_like(q[:, 2:]) * 0.1
    method = replace(PLAIN, head_adaptive=True)
    assert levels_of(method.plan(q, k, call_at())) == [4, 4, 4, 4]
    assert levels_of(replace(method, recall_eval="base").plan(q, k, call_at())) != [4, 4, 4, 4]
    assert levels_of(replace(method, recall_threshold=0.49).plan(q, k, call_at()))[:2] == [2, 2]


@pytest.mark.parametrize("per", ["row", "head"])
def test_batch_rows_compete_alone(per, device):
    mixed = sharp_and_diffuse(device, (0, 1), 4)
    sharp = sharp_and_diffuse(device, range(4), 4)
    method = replace(PLAIN, head_adaptive=True, per=per)
    alone = [method.plan(q, k, call_at()).mask.keep() for q, k in (mixed, sharp)]
    q, k = (torch.cat(pair) for pair in zip(mixed, sharp, strict=True))
    both = method.plan(q, k, call_at()).mask.keep()
    assert torch.equal(both, torch.cat(alone))


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("first_frame", [False, True])
def test_sinks_are_whole_and_outside_the_budget(block, first_frame, device):
    q, k, _ = inputs(TEXT, device)
    method = replace(PLAIN, block=block, first_frame_sink=first_frame)
    mask = method.plan(q, k, call_at(TEXT)).mask
    without = method.plan(q, k, call_at(replace(TEXT, frames=10, text=0, height=1, width=107)))
    sinks = torch.zeros(mask.nk, dtype=torch.bool, device=device)
    sinks[1053 // block :] = True
    if first_frame:
        sinks[: -(-117 // block)] = True
        without = replace(method, first_frame_sink=False).plan(
            q, k, call_at(replace(TEXT, frames=10, text=0, height=1, width=107))
        )
    kept = mask.keep()
    assert kept[..., sinks, :].all() and kept[..., sinks].all()
    assert torch.equal(kept, without.mask.keep() | sinks | sinks[:, None])
    assert mask.density() > without.mask.density()


def test_a_video_without_text_has_no_sink(device):
    q, k, _ = inputs(Grid(9, 9, 13), device)
    mask = PLAIN.plan(q, k, call_at(Grid(9, 9, 13))).mask
    assert (mask.cnt == round(0.2 * mask.nk)).all()


def test_random_blocks_are_added_reproducibly(device):
    q, k, _ = inputs(VIDEO, device)
    method = replace(PLAIN, random_share=0.05)
    without = PLAIN.plan(q, k, call_at()).mask.keep()
    plans = [method.plan(q, k, call_at(layer=layer)) for layer in (0, 0, 1)]
    for plan in plans:
        added = plan.mask.keep() & ~without
        assert not (without & ~plan.mask.keep()).any()
        assert (added.sum((-2, -1)) == round(0.05 * 400)).all()
    assert same(plans[0], plans[1])
    assert not same(plans[0], plans[2])


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


@pytest.mark.parametrize("per", ["row", "head"])
@pytest.mark.parametrize("grid", [Grid(1, 3, 5), Grid(1, 8, 8, 7), Grid(3, 5, 7, 70)], ids=str)
def test_no_query_is_without_keys_however_low_the_density(grid, per, device):
    q, k, v = inputs(grid, device)
    method = replace(PLAIN, density=1e-6, per=per, head_adaptive=True)
    plan = method.plan(q, k, call_at(grid))
    assert isinstance(plan.mask, BlockMask) and (plan.mask.cnt >= 1).all()
    assert torch.isfinite(method(q, k, v, call_at(grid))).all()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"density": 0}, r"density .* must be a finite number above 0 and at most 0.666667, got 0"),
        ({"density": 0.7}, r"density \(up to 2/3 if head_adaptive, else 1\) must be"),
        ({"density": 1.1, "head_adaptive": False}, "must be .* at most 1, got 1.1"),
        ({"density": "0.2"}, "density .* got '0.2'"),
        ({"per": "map"}, r"per must be one of \('row', 'head'\), got 'map'"),
        ({"recall_eval": "down"}, r"recall_eval must be one of \('up', 'base'\)"),
        ({"recall_threshold": 1.5}, "recall_threshold must be .* at most 1, got 1.5"),
        ({"head_adaptive": "no"}, r"head_adaptive must be one of \(True, False\), got 'no'"),
        ({"cache_lse": None}, "cache_lse must be one of"),
        ({"random_share": 1}, "random_share must be from 0 to below 1, got 1"),
        ({"random_share": -0.1}, "random_share must be from 0 to below 1"),
        ({"block": 32}, "block must be one of"),
    ],
)
def test_fields_out_of_range_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        AdaSpaAttention(**fields)
