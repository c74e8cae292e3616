"""Attention maps as tiles: what speaks for an axis order, and which tiles a mask keeps."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from vdit_sparse.grid import Grid
from vdit_sparse.kernels.select import top_blocks
from vdit_sparse.orders import AXES, axis_order

# Probabilities held at once: bounds a pass over a head's map to 256 MiB.
CHUNK = 1 << 26
# Bit patterns of fp16 numbers of at least 0, in ascending order.
LEVELS = 1 << 15


@dataclass(eq=False)
class LayerSums:
    """What one layer of one expert has shown.

    run: (grid without text, layers, steps) of the recorded runs.
    seen: the steps recorded in this pass.
    metrics: fp64 `[3, orders, H]`, sums over `measured` calls of the share of empty tiles, the
        incoherence, and the share of the probability in the heaviest tenth of the tiles, all over
        sampled rows.
    choice: int64 `[H]`, the index in `AXES` of the best order, once it is known.
    calls: how many calls went into each bin.
    maps: for each bin fp16 `[H, tiles, tiles]` on the CPU, the mean probability in a tile under the
        chosen orders, 1 for attention spread evenly over the video.
    """

    run: tuple[Grid, int, int]
    seen: set[int] = field(default_factory=set)
    metrics: Tensor | float = 0.0
    measured: int = 0
    choice: Tensor | None = None
    calls: dict[int, int] = field(default_factory=dict)
    maps: dict[int, Tensor] = field(default_factory=dict)

    def measure(self, step: int, metrics: Tensor) -> None:
        """Adds the metrics `[3, orders, H]` of one call."""
        self.metrics = self.metrics + metrics.double().cpu()
        self.measured += 1
        self.seen.add(step)

    def choose(self, alpha: float) -> None:
        """Takes the best order of each head, and ends the pass."""
        self.seen = set()
        empty, spread, _ = self.metrics / self.measured
        own = torch.tensor([AXES.index(axes) for axes in distinct_orders(self.run[0])[0]])
        self.choice = own[choose_orders(empty[None], spread[None], alpha)[0]]

    def add(self, step: int, number: int, new: Tensor) -> None:
        """Adds the map of one call to bin `number`; computes where the map is."""
        self.seen.add(step)
        calls = self.calls[number] = self.calls.get(number, 0) + 1
        mean = self.maps[number].to(new.device) if calls > 1 else torch.zeros_like(new)
        self.maps[number] = (mean + (new - mean) / calls).half().cpu()


def check_layers(layers: dict[int, LayerSums]) -> None:
    """Raises ValueError if not every layer of an expert was recorded at the same steps in this
    pass."""
    seen = set().union(*(sums.seen for sums in layers.values()))
    count = next(iter(layers.values())).run[1]
    lost = [i for i in range(count) if not seen or i not in layers or layers[i].seen != seen]
    if lost:
        raise ValueError(
            f"Layers {lost} of {count} were not recorded at the same steps as the others: run the "
            "prompts to their end, without dense layers and caches that skip layers."
        )


@lru_cache(maxsize=8)
def distinct_orders(grid: Grid) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The axis orders that differ on this grid, and for each of `AXES` its index among them."""
    orders = [axis_order(grid, axes, torch.device("cpu")) for axes in AXES]
    first = [next(j for j in range(6) if torch.equal(orders[i], orders[j])) for i in range(6)]
    places = sorted(set(first))
    return tuple(AXES[place] for place in places), tuple(places.index(place) for place in first)


def sample_rows(tiles: int, count: int, generator: torch.Generator) -> Tensor:
    """Rows of a map of `tiles` x `tiles` tiles, int64 `[min(count, tiles)]` ascending: one from
    each of `count` equal stretches, so that a mean over them has that over all rows as its
    expectation. A row on the border of two stretches may come twice."""
    if count >= tiles:
        return torch.arange(tiles)
    places = torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)
    return (places * (tiles / count)).long().clamp(max=tiles - 1)


def tile_statistics(
    q: Tensor, k: Tensor, lse: Tensor, block: int, epsilon: float | None, peaks: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of some rows of one head's map exp(D^-0.5 q k^T - lse), over its tiles of `block` x `block`,
    fp32 `[rows, tiles]` each: the sum; the share of entries below `epsilon`, None for None; the
    highest entry, None unless `peaks`.

    q: `[rows * block, D]`; k: `[tiles * block, D]`; lse: fp32 `[rows * block]` of q, of a softmax
    that may have more keys.
    """
    keys = k.float().T * q.shape[-1] ** -0.5
    rows = max(CHUNK // (block * len(k)), 1) * block
    parts = []
    for q_rows, lse_rows in zip(q.split(rows), lse.split(rows), strict=True):
        p = (q_rows.float() @ keys).sub_(lse_rows[:, None]).exp_()
        p = p.view(-1, block, len(k) // block, block)
        small = None if epsilon is None else (p < epsilon).float().mean((1, 3))
        parts.append((p.sum((1, 3)), small, p.amax((1, 3)) if peaks else None))
    columns = zip(*parts, strict=True)
    return tuple(None if part[0] is None else torch.cat(part) for part in columns)


def tile_metrics(
    q: Tensor, k: Tensor, lse: Tensor, block: int, *, epsilon: float, sigma: float, alpha: float
) -> Tensor:
    """Empty share, incoherence and coverage, fp32 `[3]`, of the rows of one head's map that
    `tile_statistics` takes; 0 for what `alpha` gives no weight."""
    mass, small, peak = tile_statistics(q, k, lse, block, epsilon if alpha else None, alpha < 1)
    empty = mass.new_zeros(()) if small is None else empty_share(small, sigma)
    spread = mass.new_zeros(()) if peak is None else incoherence(mass, peak, block)
    return torch.stack([empty, spread, coverage(mass)])


def empty_share(small: Tensor, sigma: float) -> Tensor:
    """M_sparse of the paper: the share of tiles with at least `sigma` small entries, 0 to 1."""
    return (small >= sigma).float().mean()


def incoherence(mass: Tensor, peak: Tensor, block: int) -> Tensor:
    """M_quant of the paper: the mean over tiles of their highest entry over their mean one, at
    least 1; 1 for a tile of zeros."""
    return torch.where(mass > 0, peak * block * block / mass, 1.0).mean()


def coverage(mass: Tensor) -> Tensor:
    """The share of all mass in the heaviest tenth of the tiles."""
    tenth = math.ceil(mass.numel() / 10)
    return mass.flatten().topk(tenth).values.sum() / mass.sum()


def choose_orders(empty: Tensor, spread: Tensor, alpha: float) -> Tensor:
    """The index of the best order, int64 `[L, H]`, by the share of empty tiles and the incoherence
    `[L, orders, H]`; see `PAROSearch.alpha`. The first of equal ones."""
    shares = [x / x.sum(1, keepdim=True).clamp(min=1e-30) for x in (1 - empty, spread)]
    return (alpha * shares[0] + (1 - alpha) * shares[1]).argmin(1)


def keep_heaviest(
    maps: Sequence[Tensor], density: float, mode: str, block: int
) -> Iterator[Tensor]:
    """The kept tiles of each of `maps`, fp16 `[H, tiles, tiles]`, in turn: bool like the map."""
    least = threshold(maps, density) if mode == "threshold" else None
    for x in maps:
        heaviest = x.argmax(-1, keepdim=True)
        if least is not None:
            yield (x >= least).scatter(-1, heaviest, True)
            continue
        count = max(round(density * x[0].numel()), len(x[0]))
        # The heaviest of each row are part of the budget.
        score = x.float().scatter(-1, heaviest, math.inf)
        yield top_blocks(score[None], count, block, per="head").keep()[0]


def shares_of(x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The kept share of the tiles and of all probability of their rows, fp32 `[H]`, for a map
    `[H, tiles, tiles]` that is 1 where attention is even."""
    return keep.float().mean((-2, -1)), (x.float() * keep).mean((-2, -1))


def threshold(maps: Sequence[Tensor], density: float) -> Tensor:
    """The fp16 number at which the kept share of all tiles comes closest to `density`, if each row
    keeps its heaviest tile; exact, by counting every fp16 number."""
    values = torch.zeros(LEVELS, dtype=torch.int64)
    tops = torch.zeros_like(values)
    for x in maps:
        values += torch.bincount(x.flatten().view(torch.int16), minlength=LEVELS)
        tops += torch.bincount(x.amax(-1).flatten().view(torch.int16), minlength=LEVELS)
    reaching = values.flip(0).cumsum(0).flip(0)
    rescued = tops.cumsum(0) - tops
    off = (reaching + rescued - density * values.sum()).abs()
    return off.argmin().to(torch.int16).view(torch.float16)
