"""From what heads lose to who computes how much when: the decisions of `vdit-sparse tune`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vdit_sparse.tuned_table import NOTHING

HALVINGS = 24


class OutOfReach(ValueError):
    """No schedule has what was asked for."""


@dataclass(frozen=True, eq=False)
class Losses:
    """What a head loses between its dense steps, of one expert.

    error: fp64 `[n, reach, levels, L, H]`, at [i, j] of step i + 1 + j living on dense step i, with
    the best share of what that step left; share: that share, 0 to 1, of the same shape; kept: fp64
    `[levels]`, the density of each level.
    """

    error: Tensor
    share: Tensor
    kept: Tensor

    @classmethod
    def of(cls, sums: Tensor, kept: Tensor) -> "Losses":
        """From the sums of `TuneRecorder.result`: |o - m - s (c - m)|^2 is least at
        s = (o - m)(c - m) / (c - m)^2, taken between 0 and 1."""
        plain, cross, square = sums.double().unbind(3)
        share = (cross / square.clamp(min=1e-30)).clamp(0, 1)
        # As the file holds it.
        share = share.half().double()
        error = (plain - 2 * share * cross + share.square() * square).clamp(min=0)
        return cls(error, share, kept.double())


@dataclass(frozen=True, eq=False)
class Choice:
    """Who computes how much when: dense bool, level int8 and share fp16, all `[n, L, H]` as in
    `TunedAttention`; density: mean over steps, layers and heads; loss: weighted error `[n, L, H]`.
    """

    dense: Tensor
    level: Tensor
    share: Tensor
    density: float
    loss: Tensor


def allocate(
    parts: Sequence[tuple[Losses, Tensor]], density: float, together: float = 0.0
) -> list[Choice]:
    """The dense steps of each head, and what it keeps between them, of least weighted error at a
    mean density, for the losses and the weight of each expert.

    A weight, `[n, L, H]`, is what an error of 1 of a head at a step costs. together: 0 to 1, how
    alike the errors are that a head makes on one dense step: |e1 + e2|^2 is the sum of both for 0,
    and (|e1| + |e2|)^2 for 1, so that living long on one step costs more. For a price of a block
    each head's best schedule is found exactly, from the last step to the first (dynamic programming
    over where its dense steps are); bisection finds the lowest price at which the mean density is
    at most `density` (the Lagrangian of one budget for all heads, steps and experts). Raises
    OutOfReach, a ValueError, if no schedule within reach is as sparse as that.
    """
    least = lowest([losses for losses, _ in parts])
    if least > density:
        raise OutOfReach(
            f"The lowest mean density of these candidates is {least:.3f}, expected at most "
            f"{density:g}: ask for more, or search with a longer reach or lower densities."
        )
    weighted = [_weighted(losses.error, weight.double(), together) for losses, weight in parts]

    def at(price: float) -> list[Choice]:
        each = zip(parts, weighted, strict=True)
        return [_schedule(losses, costs, math.exp(price)) for (losses, _), costs in each]

    largest = max(float(x.where(x.isfinite(), 0).max()) for x in weighted) + 1e-12
    high = math.log(1e3 * max(map(len, weighted)) * largest)
    low, best = high - 60, at(high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = at(middle)
        if mean_density(found) <= density:
            best, high = found, middle
        else:
            low = middle
    return best


def mean_density(choices: Sequence[Choice]) -> float:
    """Over the steps of all experts."""
    steps = [len(choice.dense) for choice in choices]
    total = sum(n * choice.density for n, choice in zip(steps, choices, strict=True))
    return total / sum(steps)


def lowest(parts: Sequence[Losses]) -> float:
    """The lowest mean density that there is: as few dense steps as the reach allows."""
    spent = total = 0
    for losses in parts:
        n, reach = losses.error.shape[:2]
        dense = -(-n // (reach + 1))
        spent += dense + (n - dense) * float(losses.kept.min())
        total += n
    return spent / total


def _weighted(error: Tensor, weight: Tensor, together: float) -> Tensor:
    """Errors of the shape of `Losses.error`, added up over the steps since the dense one; infinite
    past the last step."""
    n, reach = error.shape[:2]
    total = torch.full_like(error, torch.inf)
    for i in range(n):
        count = min(reach, n - 1 - i)
        if count:
            here = error[i, :count] * weight[i + 1 : i + 1 + count, None]
            alike = here.sqrt().cumsum(0).square()
            total[i, :count] = (1 - together) * here.cumsum(0) + together * alike
    return total


def _schedule(losses: Losses, weighted: Tensor, price: float) -> Choice:
    """Each head's best schedule where a block costs `price` (a dense step has 1)."""
    n, reach, _, layers, heads = weighted.shape
    count = torch.arange(1, reach + 1, dtype=torch.float64)[:, None]
    cost = price * (count * losses.kept)[..., None, None]
    # Of each dense step i and number of sparse ones after it: the best level, 0 sparse ones first.
    spent, level = (weighted + cost).min(2)
    none = torch.zeros(n, 1, layers, heads, dtype=torch.float64)
    spent = torch.cat([none, spent], 1) + price
    least = torch.zeros(n + reach + 1, layers, heads, dtype=torch.float64)
    length = torch.zeros(n, layers, heads, dtype=torch.long)
    for i in range(n - 1, -1, -1):
        least[i], length[i] = (spent[i] + least[i + 1 : i + 2 + reach]).min(0)
    return _choice(losses, weighted, length, level)


def _choice(losses: Losses, weighted: Tensor, length: Tensor, level: Tensor) -> Choice:
    """Follows the best lengths from the first step on."""
    n, layers, heads = length.shape
    dense = torch.zeros(n, layers, heads, dtype=torch.bool)
    chosen = torch.full((n, layers, heads), NOTHING, dtype=torch.int8)
    share, loss = (torch.zeros(n, layers, heads, dtype=torch.float64) for _ in range(2))
    start = torch.zeros(layers, heads, dtype=torch.long)
    at = torch.meshgrid(torch.arange(layers), torch.arange(heads), indexing="ij")
    for step in range(n):
        fresh = (start == step) if step == 0 else start + 1 + length[(start, *at)] == step
        start = torch.where(fresh, step, start)
        dense[step] = fresh
        long = length[(start, *at)]
        own = level[(start, (long - 1).clamp(min=0), *at)]
        chosen[step] = torch.where(long > 0, own, NOTHING)
        lag = (step - start - 1).clamp(min=0)
        here = (start, lag, own, *at)
        share[step] = torch.where(long > 0, losses.share[here], 0)
        before = torch.where(lag > 0, weighted[(start, (lag - 1).clamp(min=0), own, *at)], 0)
        loss[step] = torch.where(fresh, 0, weighted[here] - before)
    kept = losses.kept[chosen.long().clamp(min=0)]
    density = float(torch.where(dense, 1.0, kept).mean())
    return Choice(dense, chosen, share.half(), density, loss)
