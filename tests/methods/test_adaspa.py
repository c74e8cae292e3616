"""AdaSpa's own laws: what a search finds, which heads get how much, sinks and fields."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.methods.adaspa_cases import (
    PLAIN,
    TEXT,
    TOLERANCE,
    VIDEO,
    call_at,
    inputs,
    planted,
    same,
    sharp_and_diffuse,
)
from vdit_sparse.grid import Grid
from vdit_sparse.kernels.block_mass import block_mass
from vdit_sparse.methods.adaspa import AdaSpaAttention


def fresh_mass(q, k):
    lse = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).logsumexp(-1).float()
    return block_mass(q, k, lse, 64, backend="reference")


def recall(mass, mask):
    return (mass * mask.keep()).sum((-2, -1)) / mass.sum((-2, -1))


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
    mask = replace(PLAIN, density=0.29, block=block).plan(q, k, call_at()).mask
    weights = (q.double() @ k.double().transpose(-1, -2) / 4).softmax(-1)
    mass = weights.unflatten(3, (-1, block)).unflatten(2, (-1, block)).sum((3, 5))
    count = {64: 6, 128: 3}[block]
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
    mixed = sharp_and_diffuse(device, (0,), 4)
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
    no_text = Grid(10, 1, 107)
    without = replace(PLAIN, block=block).plan(q, k, call_at(no_text)).mask
    sinks = torch.zeros(mask.nk, dtype=torch.bool, device=device)
    sinks[1053 // block :] = True
    if first_frame:
        sinks[: -(-117 // block)] = True
    assert torch.equal(mask.keep(), without.keep() | sinks | sinks[:, None])
    assert mask.density() > without.density()


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


@pytest.mark.parametrize("per", ["row", "head"])
@pytest.mark.parametrize("grid", [Grid(1, 3, 5), Grid(1, 8, 8, 7), Grid(3, 5, 7, 70)], ids=str)
def test_no_query_is_without_keys_however_low_the_density(grid, per, device):
    q, k, v = inputs(grid, device)
    method = replace(PLAIN, density=1e-6, per=per, head_adaptive=True)
    plan = method.plan(q, k, call_at(grid))
    assert (plan.mask.cnt >= 1).all()
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
