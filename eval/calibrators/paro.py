"""The search behind PAROAttention: an axis order for each head, masks for each bin of steps."""

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from vdit_sparse.call import Call
from vdit_sparse.eval.calibrators.paro_tiles import (
    choose_orders,
    coverage,
    empty_share,
    incoherence,
    keep_heaviest,
    tile_statistics,
)
from vdit_sparse.grid import Grid
from vdit_sparse.kernels.block_mask import BLOCK_SIZES, BlockMask
from vdit_sparse.kernels.reorder import reorder
from vdit_sparse.method import Plan, SparseAttention, check_choice, check_number, execute
from vdit_sparse.methods.paro import PAROAttention, pack, whole_blocks
from vdit_sparse.orders import AXES, axis_order

# The video of CogVideoX at 480 x 720, for which the paper's epsilon of 1e-3 was given.
EPSILON, EPSILON_TOKENS = 1e-3, 17550


@dataclass(frozen=True, kw_only=True)
class PAROSearch:
    """Which orders and masks PAROAttention (arXiv 2506.16054) is given, and by which rule.

    The authors released no code of their search. Over all prompts, steps, guidance branches and
    batch rows, the recorder averages for each head and each of the six orders: the share of empty
    tiles, those of which a share of at least `sigma` of all probabilities is below `epsilon`; the
    incoherence, the mean over tiles of their highest probability over their mean one; and, in each
    bin of steps, the probability in each tile. A tile is `block` x `block` of the softmax over the
    whole sequence; counted are the whole blocks of video.

    block: tokens of a tile, 64 (the paper's) or 128.
    density: kept share of these tiles, above 0 to 1, averaged over bins, layers and heads of an
        expert. At least one tile of each row is kept, the heaviest.
    alpha: the order chosen has the lowest alpha * full + (1 - alpha) * incoherence, full the share
        of tiles that are not empty and each term divided by its sum over the orders; of equal ones
        the first in `AXES`. 1 for sparse attention, 0.5 for 8-bit sparse attention, 0 for 8-bit
        alone; below 1 compare `coverage`, for it takes scattered orders for some heads. The paper
        prints the share of empty tiles itself, which would reward dense maps, and no alpha.
    epsilon: None for 1e-3 * 17550 / tokens of the video, as probabilities fall with the length.
    sigma: 0.999 leaves an empty tile of 64 x 64 four probabilities above epsilon. The paper's
        example is 0.9, by which a tile with only a diagonal is empty, for 63 of its 64ths are
        small; scattered diagonals then win over the dense blocks that are wanted. On planted heads
        0.9 mostly chose one of the worst orders, 0.999 always one of the best.
    mode: "threshold" keeps the tiles above one probability, the same for all heads of an expert, so
        that concentrated heads keep few; "per_head" keeps `density` of the tiles of each head. The
        paper leaves this open; the files of its demo have a density for each head.
    bins: "half" gives each step of the first half of the run its own masks, and the second half
        common ones from its mean map, as in the paper; an int so many bins of equal length.

    Raises ValueError for a field out of range.
    """

    block: int = 64
    density: float = 0.3
    alpha: float = 1.0
    epsilon: float | None = None
    sigma: float = 0.999
    mode: str = "threshold"
    bins: str | int = "half"

    method = PAROAttention

    def __post_init__(self):
        check_choice("block", self.block, BLOCK_SIZES)
        check_choice("mode", self.mode, ("threshold", "per_head"))
        check_number("density", self.density, 0, 1)
        check_number("sigma", self.sigma, 0, 1)
        if self.epsilon is not None:
            check_number("epsilon", self.epsilon, 0, 1)
        if type(self.alpha) not in (int, float) or not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be a number from 0 to 1, got {self.alpha!r}.")
        if self.bins != "half" and (type(self.bins) is not int or self.bins < 1):
            raise ValueError(f'bins must be "half" or an integer of at least 1, got {self.bins!r}.')

    def recorder(self) -> "PARORecorder":
        """An empty recorder: apply it to the pipeline, run the prompts, ask for its `result`."""
        return PARORecorder(search=self, block=self.block)

    def bin_of(self, step: int, steps: int) -> int:
        """The bin of a step, 0 for the first, not falling."""
        return min(step, steps // 2) if self.bins == "half" else step * self.bins // steps


@dataclass(eq=False)
class LayerSums:
    """What one layer of one expert has shown.

    run: (grid, layers, steps) of the recorded runs; seen: their recorded steps; calls: how many
        calls went into each bin.
    metrics: fp64 `[3, orders, H]`, sums over calls of the share of empty tiles, the incoherence,
        and the share of the video's probability in the heaviest tenth of the tiles.
    maps: for each bin and distinct order fp16 `[H, tiles, tiles]`, the mean probability in a tile,
        1 for attention spread evenly over the video.
    """

    run: tuple[Grid, int, int]
    metrics: Tensor | float = 0.0
    seen: set[int] = field(default_factory=set)
    calls: dict[int, int] = field(default_factory=dict)
    maps: dict[int, list[Tensor]] = field(default_factory=dict)

    def add(self, number: int, metrics: Tensor, maps: list[Tensor]) -> None:
        """Adds one call to bin `number`."""
        self.metrics = self.metrics + metrics.double().cpu()
        calls = self.calls[number] = self.calls.get(number, 0) + 1
        means = self.maps.get(number, [torch.zeros(())] * len(maps))
        self.maps[number] = [
            (mean + (new.cpu() - mean) / calls).half()
            for mean, new in zip(means, maps, strict=True)
        ]

    def chosen(self, choice: Tensor, bins: list[int]) -> Tensor:
        """The maps in the order `choice` `[H]` of each head, `[bins, H, tiles, tiles]`."""
        heads = list(enumerate(choice.tolist()))
        return torch.stack(
            [torch.stack([self.maps[number][order][h] for h, order in heads]) for number in bins]
        )


@dataclass(frozen=True, kw_only=True)
class PARORecorder(SparseAttention):
    """Dense attention that gathers what `PAROSearch` needs.

    It passes over every map once more for each order, in fp32, row by row. It holds on the CPU
    2 bytes * bins * orders * layers * heads * tiles^2 (Wan 2.1 1.3B at 480p with 10 bins: 11 GB;
    Wan 2.1 14B at 720p with 4: 107 GB).
    """

    search: PAROSearch
    found: dict[str, dict[int, LayerSums]] = field(default_factory=dict, compare=False, repr=False)

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        """The plan that keeps everything."""
        blocks = -(-call.grid.tokens // self.block)
        cnt = torch.full((1, 1, blocks), blocks, dtype=torch.int32, device=q.device)
        return Plan(
            BlockMask(torch.zeros_like(cnt)[..., None], cnt, blocks, self.block, self.block)
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Dense attention of q, k, v `[B, H, S, D]`, whose map is recorded.

        Raises ValueError for a video of less than one block, runs of unknown or different lengths,
        and different grids.
        """
        sums, plan = self._sums(call), self.plan(q, k, call)
        out, lse = execute(q, k, v, plan, precision=self.precision, backend=self.backend)
        call.note.density, call.note.searched = 1.0, True
        orders = [axis_order(call.grid, axes, q.device) for axes in _distinct(call.grid)[0]]
        shown = [self._measure(q, k, lse, order, call.grid) for order in orders]
        metrics, maps = zip(*shown, strict=True)
        sums.seen.add(call.step)
        sums.add(self.search.bin_of(call.step, call.steps), torch.stack(metrics, 1), list(maps))
        return out

    def result(self) -> dict[str, Tensor]:
        """What was found, after all prompts, on the CPU, as "<expert>.<name>".

        "order", "bin" and "keep" as `PAROAttention` reads them; for reports, in fp32, "density" and
        "kept_mass" `[bins, layers, heads]`, the kept share of the video's whole tiles and of all
        probability of the rows in them, and "coverage" `[layers, heads, 6]`, the share of the
        video's probability in the heaviest tenth of the tiles under each order.
        Raises ValueError if nothing was recorded, or not every layer at every step.
        """
        if not self.found:
            raise ValueError(
                "Nothing was recorded: apply the recorder to a pipeline and run prompts first."
            )
        return {
            f"{expert}.{name}": found
            for expert, layers in self.found.items()
            for name, found in _searched(self.search, layers).items()
        }

    def _sums(self, call: Call) -> LayerSums:
        run = call.grid, call.layers, call.steps
        if call.steps is None:
            raise ValueError(
                "Calibration needs the number of denoising steps, which a bare transformer does "
                "not know: use vdit_sparse.apply on the pipeline."
            )
        if not whole_blocks(call.grid, self.block):
            raise ValueError(
                f"The video has {call.grid.video} tokens, less than one block of {self.block}: "
                "there is nothing to leave out. Use a larger size."
            )
        layers = self.found.setdefault(call.origin.expert, {})
        sums = layers.setdefault(call.layer, LayerSums(run))
        if sums.run != run:
            raise ValueError(
                "One calibration is for one grid and number of steps: expected (grid, layers, "
                f"steps) {sums.run}, got {run}. Run all prompts at the same size."
            )
        return sums

    def _measure(
        self, q: Tensor, k: Tensor, lse: Tensor, order: Tensor, grid: Grid
    ) -> tuple[Tensor, Tensor]:
        """Metrics `[3, H]` and maps `[H, tiles, tiles]` under one order, means over batch rows."""
        search, tiles = self.search, whole_blocks(grid, self.block)
        epsilon = search.epsilon or EPSILON * EPSILON_TOKENS / grid.video
        q, k, lse = (reorder(x, order[: tiles * self.block]) for x in (q, k, lse))
        metrics, maps = [], []
        for head in zip(q.flatten(0, 1), k.flatten(0, 1), lse.flatten(0, 1), strict=True):
            mass, small, peak = tile_statistics(
                *head, self.block, epsilon if search.alpha else None, search.alpha < 1
            )
            empty = mass.new_zeros(()) if small is None else empty_share(small, search.sigma)
            spread = mass.new_zeros(()) if peak is None else incoherence(mass, peak, self.block)
            metrics.append(torch.stack([empty, spread, coverage(mass)]))
            maps.append(mass * (tiles / self.block))
        metrics, maps = (
            torch.stack(x).unflatten(0, lse.shape[:2]).mean(0) for x in (metrics, maps)
        )
        return metrics.T, maps


@lru_cache(maxsize=8)
def _distinct(grid: Grid) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The axis orders that differ on this grid, and for each of `AXES` its index among them."""
    orders = [axis_order(grid, axes, torch.device("cpu")) for axes in AXES]
    first = [next(j for j in range(6) if torch.equal(orders[i], orders[j])) for i in range(6)]
    places = sorted(set(first))
    return tuple(AXES[place] for place in places), tuple(places.index(place) for place in first)


def _searched(search: PAROSearch, layers: dict[int, LayerSums]) -> dict[str, Tensor]:
    some = next(iter(layers.values()))
    grid, count, steps = some.run
    bins = sorted(some.calls)
    lost = [i for i in range(count) if i not in layers or layers[i].seen != some.seen]
    if lost:
        raise ValueError(
            f"Layers {lost} of {count} were not recorded at the same steps as the others: run the "
            "prompts to their end, without dense layers and caches that skip layers."
        )
    sums = [layers[i] for i in range(count)]
    metrics = torch.stack([x.metrics / sum(x.calls.values()) for x in sums])
    choice = choose_orders(metrics[:, 0], metrics[:, 1], search.alpha)
    maps = [x.chosen(choice[i], bins) for i, x in enumerate(sums)]
    keeps = keep_heaviest(maps, search.density, search.mode, search.block)
    kept = [(x.float() * keep).mean((-2, -1)) for x, keep in zip(maps, keeps, strict=True)]
    names, places = _distinct(grid)
    own = torch.tensor([AXES.index(name) for name in names], dtype=torch.int8)
    numbers = torch.full((steps,), -1, dtype=torch.int16)
    for step in some.seen:
        numbers[step] = bins.index(search.bin_of(step, steps))
    edge = -(-grid.tokens // search.block) - whole_blocks(grid, search.block)
    return {
        "order": own[choice],
        "bin": numbers,
        "keep": torch.stack([pack(pad(keep, (0, edge, 0, edge), value=True)) for keep in keeps], 1),
        "density": torch.stack([keep.float().mean((-2, -1)) for keep in keeps], 1),
        "kept_mass": torch.stack(kept, 1),
        "coverage": metrics[:, 2].mT[..., list(places)].float(),
    }
