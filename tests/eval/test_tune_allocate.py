"""Schedules against all that there are, on a few steps; the budget; the best share."""

from itertools import product

import pytest
import torch

from vdit_sparse.eval.tune_allocate import Losses, allocate, lowest, mean_density
from vdit_sparse.tuned_table import NOTHING

STEPS, LEVELS = 4, (0.0, 0.5)


def losses(layers=1, heads=1, reach=3) -> Losses:
    error = torch.rand(STEPS, reach, len(LEVELS), layers, heads, dtype=torch.float64)
    kept = torch.tensor(LEVELS, dtype=torch.float64)
    return Losses(error, torch.rand_like(error), kept)


def schedules(one: Losses, weight, together=0.0):
    """(density, loss) of every schedule of one head."""
    for dense in product((True, False), repeat=STEPS - 1):
        starts = [0, *(i + 1 for i, new in enumerate(dense) if new)]
        ends = [*starts[1:], STEPS]
        for levels in product(range(len(LEVELS)), repeat=len(starts)):
            kept = loss = 0.0
            for start, end, level in zip(starts, ends, levels, strict=True):
                kept += 1 + (end - start - 1) * LEVELS[level]
                steps = range(start + 1, end)
                each = [
                    float(one.error[start, t - start - 1, level, 0, 0] * weight[t, 0, 0])
                    for t in steps
                ]
                alike = sum(x**0.5 for x in each) ** 2
                loss += (1 - together) * sum(each) + together * alike
            yield kept / STEPS, loss


@pytest.mark.parametrize("together", [0.0, 0.3, 1.0])
def test_no_other_schedule_is_as_sparse_and_as_good(together):
    for _ in range(5):
        one, weight = losses(), torch.rand(STEPS, 1, 1)
        found = allocate([(one, weight)], 0.6, together)[0]
        assert found.density <= 0.6
        better = [s for s in schedules(one, weight, together) if s[0] <= found.density + 1e-9]
        assert float(found.loss.sum()) == pytest.approx(min(loss for _, loss in better))


def test_a_choice_says_what_the_method_reads():
    found = allocate([(losses(2, 3), torch.ones(STEPS, 2, 3))], 0.5)[0]
    assert found.dense[0].all() and found.density <= 0.5
    for layer, head in product(range(2), range(3)):
        level = found.level[:, layer, head].tolist()
        dense = found.dense[:, layer, head].tolist()
        for step in range(1, STEPS):
            if dense[step]:
                continue
            assert level[step] == level[step - 1] != NOTHING
        for step in range(STEPS):
            followed = step + 1 < STEPS and not dense[step + 1]
            assert not dense[step] or (level[step] != NOTHING) == followed


def test_heads_that_matter_get_more():
    even = losses(1, 2)
    error = even.error[..., :1].expand(-1, -1, -1, -1, 2)
    weight = torch.ones(STEPS, 1, 2)
    weight[..., 1] = 1e6
    found = allocate([(Losses(error, error, even.kept), weight)], 0.6)[0]
    kept = torch.where(found.dense, 1.0, even.kept[found.level.long().clamp(min=0)])
    assert kept[..., 1].mean() > kept[..., 0].mean()


def test_experts_share_one_budget():
    parts = [(losses(), torch.ones(STEPS, 1, 1)), (losses(), 1e6 * torch.ones(STEPS, 1, 1))]
    found = allocate(parts, 0.6)
    assert mean_density(found) <= 0.6 and found[0].density < found[1].density


def test_everything_dense_costs_nothing_and_too_little_is_refused():
    one = losses()
    dense = allocate([(one, torch.ones(STEPS, 1, 1))], 1.0)[0]
    assert dense.dense.all() and dense.density == 1 and not dense.loss.any()
    with pytest.raises(
        ValueError, match=r"lowest mean density .* is 0\.250, expected at most 0\.2"
    ):
        allocate([(one, torch.ones(STEPS, 1, 1))], 0.2)


def test_a_short_reach_forces_dense_steps():
    found = allocate([(losses(reach=1), torch.ones(STEPS, 1, 1))], 0.5)[0]
    assert found.dense[:, 0, 0].tolist() == [True, False, True, False]
    assert lowest([losses(reach=1)]) == 0.5 and lowest([losses()] * 2) == 0.25


def test_the_share_is_the_least_squares_one():
    o, m, c = torch.randn(3, 100, dtype=torch.float64)
    c = m + 0.4 * (o - m) + 0.1 * c
    gap, back = o - m, c - m
    sums = torch.stack([gap.dot(gap), gap.dot(back), back.dot(back)]).view(1, 1, 1, 3, 1, 1)
    found = Losses.of(sums, torch.zeros(1))
    shares = torch.linspace(0, 1, 1001, dtype=torch.float64)
    errors = (gap - shares[:, None] * back).square().sum(1)
    assert float(found.error) == pytest.approx(float(errors.min()), rel=1e-4)
    assert float(found.share) == pytest.approx(float(shares[errors.argmin()]), abs=1e-3)
