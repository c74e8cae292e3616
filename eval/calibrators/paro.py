"""The search behind PAROAttention: an axis order for each head, masks for each bin of steps."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from vdit_sparse.call import Call
from vdit_sparse.eval.calibrators.paro_tiles import (
    LayerSums,
    check_layers,
    distinct_orders,
    keep_heaviest,
    sample_rows,
    shares_of,
    tile_metrics,
)
from vdit_sparse.grid import Grid
from vdit_sparse.kernels.block_mask import BLOCK_SIZES, BlockMask
from vdit_sparse.kernels.block_mass import block_mass
from vdit_sparse.kernels.reorder import reorder
from vdit_sparse.method import Plan, SparseAttention, check_choice, check_number, execute
from vdit_sparse.methods.paro import PAROAttention, pack, whole_blocks
from vdit_sparse.orders import AXES, axis_order

# The video of CogVideoX at 480 x 720, for which the paper's epsilon of 1e-3 was given.
EPSILON, EPSILON_TOKENS = 1e-3, 17550


@dataclass(frozen=True, kw_only=True)
class PAROSearch:
    """Which orders and masks PAROAttention (arXiv 2506.16054) is given, and by which rule.

    The authors released no code of their search. Ours runs all prompts twice. First it averages
    for each head and each of the six orders, over prompts, guidance branches, batch rows and
    `order_steps` steps: the share of empty tiles, those of which a share of at least `sigma` of all
    probabilities is below `epsilon`; and the incoherence, the mean over tiles of their highest
    probability over their mean one. Then, under the orders so chosen and over all steps of each
    bin: the probability in each tile. A tile is `block` x `block` of the softmax over the whole
    sequence; counted are the whole blocks of video.

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
        common ones from its mean map, as in the paper; an int so many bins of equal length. The
        maps of all bins are held at once: see `memory` first.
    order_steps: at how many steps orders are measured: the first, the last and evenly between; one
        is the middle. Each expert must run at one of them.
    order_rows: how many rows of tiles of a call are measured under each order: random ones, one of
        each of so many equal stretches, over which the means are exact in expectation. With all
        steps and rows, nothing is sampled.

    Raises ValueError for a field out of range.
    """

    block: int = 64
    density: float = 0.3
    alpha: float = 1.0
    epsilon: float | None = None
    sigma: float = 0.999
    mode: str = "threshold"
    bins: str | int = "half"
    order_steps: int = 4
    order_rows: int = 64

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
        for name in ("order_steps", "order_rows"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")

    def recorder(self) -> "PARORecorder":
        """An empty recorder: apply it to the pipeline, run the prompts, tell it `begin(1)`, run
        them again, ask for its `result`."""
        return PARORecorder(search=self, block=self.block)

    def bin_of(self, step: int, steps: int) -> int:
        """The bin of a step, 0 for the first, not falling."""
        return min(step, steps // 2) if self.bins == "half" else step * self.bins // steps

    def measured_steps(self, steps: int) -> set[int]:
        """The steps of a run of `steps` at which orders are measured."""
        if self.order_steps == 1:
            return {steps // 2}
        gap = (steps - 1) / (self.order_steps - 1)
        return {round(i * gap) for i in range(self.order_steps)}


def memory(search: PAROSearch, grid: Grid, *, layers: int, heads: int, steps: int) -> int:
    """Bytes of the maps that a search holds on the CPU: 2 * bins * layers * heads * tiles^2. The
    experts of Wan 2.2 share the bins; one in which they change counts for both."""
    bins = len({search.bin_of(step, steps) for step in range(steps)})
    return 2 * bins * layers * heads * whole_blocks(grid, search.block) ** 2


@dataclass(eq=False)
class Record:
    """What a recorder has seen: the number of the pass, what each layer of each expert has shown in
    it and before, and where its sampled rows come from."""

    number: int = 0
    found: dict[str, dict[int, LayerSums]] = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))


@dataclass(frozen=True, kw_only=True)
class PARORecorder(SparseAttention):
    """Dense attention that gathers what `PAROSearch` needs, in two passes over the same runs.

    The first measures sampled rows of the map under each order at a few steps, and keeps numbers;
    `begin(1)` then chooses the orders. The second adds up each call's map under them, with one more
    product of q and k, and holds on the CPU what `memory` says: 17.9 GB for Wan 2.1 14B at 720p
    with 4 bins, 4.5 GB with blocks of 128, 116 GB with the 26 bins of "half" and 50 steps.
    """

    passes = 2

    search: PAROSearch
    record: Record = field(default_factory=Record, compare=False, repr=False)

    def begin(self, number: int) -> None:
        """Starts a pass: 0 forgets everything, 1 chooses the orders by what pass 0 has shown.

        Raises ValueError for another number, and for 1 if nothing was measured, an expert not at
        all, or not every layer at the same steps.
        """
        if number not in range(self.passes):
            raise ValueError(f"The passes of this recorder are 0 and 1, got {number!r}.")
        record = self.record
        if number == 0:
            record.found.clear()
        else:
            _check_found(record.found)
        for expert, layers in record.found.items():
            if not any(sums.measured for sums in layers.values()):
                raise ValueError(
                    f"No order can be chosen for {expert}, which ran at none of the measured steps "
                    f"of a search with order_steps={self.search.order_steps}: raise order_steps."
                )
            check_layers(layers)
        for sums in (x for layers in record.found.values() for x in layers.values()):
            sums.choose(self.search.alpha)
        record.number = number

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        """The plan that keeps everything."""
        return Plan(BlockMask.full(call.grid.tokens, block=self.block, device=q.device))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Dense attention of q, k, v `[B, H, S, D]`, whose map is recorded.

        Raises ValueError for a video of less than one block, runs of unknown or different lengths,
        videos of different sizes, and a layer that only the second pass sees.
        """
        sums, plan = self._sums(call), self.plan(q, k, call)
        how = {"precision": self.precision, "backend": self.backend}
        out, lse = execute(q, k, v, plan, kv_len=call.kv_len, **how)
        call.note.density = 1.0
        if self.record.number == 1:
            call.note.searched = True
            number = self.search.bin_of(call.step, call.steps)
            sums.add(call.step, number, self._map(q, k, lse, sums.choice, call.grid))
        elif call.step in self.search.measured_steps(call.steps):
            call.note.searched = True
            sums.measure(call.step, self._metrics(q, k, lse, call.grid))
        return out

    def result(self) -> dict[str, Tensor]:
        """What was found, after all prompts in both passes, on the CPU, as "<expert>.<name>".

        "order", "bin" and "keep" as `PAROAttention` reads them; for reports, in fp32, "density" and
        "kept_mass" `[bins, layers, heads]`, the kept share of the video's whole tiles and of all
        probability of the rows in them, and "coverage" `[layers, heads, 6]`, the share of the
        sampled rows' probability in the heaviest tenth of their tiles under each order.
        Raises ValueError if a pass was not recorded, or not every layer at every step.
        """
        _check_found(self.record.found)
        if self.record.number == 0:
            raise ValueError(
                "Only the orders were measured: call begin(1) and run the same prompts once more."
            )
        return {
            f"{expert}.{name}": found
            for expert, layers in self.record.found.items()
            for name, found in _searched(self.search, layers).items()
        }

    def _sums(self, call: Call) -> LayerSums:
        run = replace(call.grid, text=0), call.layers, call.steps
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
        layers = self.record.found.setdefault(call.origin.expert, {})
        sums = layers.setdefault(call.layer, LayerSums(run))
        if sums.run != run:
            raise ValueError(
                "One calibration is for one grid and number of steps: expected (grid, layers, "
                f"steps) {sums.run}, got {run}. Run all prompts at the same size."
            )
        if self.record.number == 1 and sums.choice is None:
            raise ValueError(
                f"Layer {call.layer} of {call.origin.expert} was not in the first pass: run the "
                "same prompts in both."
            )
        return sums

    def _metrics(self, q: Tensor, k: Tensor, lse: Tensor, grid: Grid) -> Tensor:
        """Metrics `[3, orders, H]` of sampled rows in each distinct order, batch rows averaged."""
        search, tiles = self.search, whole_blocks(grid, self.block)
        epsilon = search.epsilon or EPSILON * EPSILON_TOKENS / grid.video
        rule = {"epsilon": epsilon, "sigma": search.sigma, "alpha": search.alpha}
        rows = sample_rows(tiles, search.order_rows, self.record.generator).to(q.device)
        found = []
        for axes in distinct_orders(grid)[0]:
            order = axis_order(grid, axes, q.device)[: tiles * self.block]
            seen = order.view(tiles, self.block)[rows].flatten()
            parts = reorder(q, seen), reorder(k, order), reorder(lse, seen)
            heads = zip(*(x.flatten(0, 1) for x in parts), strict=True)
            shown = torch.stack([tile_metrics(*head, self.block, **rule) for head in heads])
            found.append(shown.unflatten(0, q.shape[:2]).mean(0).T)
        return torch.stack(found, 1)

    def _map(self, q: Tensor, k: Tensor, lse: Tensor, choice: Tensor, grid: Grid) -> Tensor:
        """The map `[H, tiles, tiles]` under the chosen orders, the mean over batch rows."""
        tiles = whole_blocks(grid, self.block)
        orders = [axis_order(grid, AXES[i], q.device) for i in choice.tolist()]
        order = torch.stack([order[: tiles * self.block] for order in orders])
        mass = block_mass(*(reorder(x, order) for x in (q, k, lse)), self.block)
        return mass.mean(0) * (tiles / self.block)


def _check_found(found: dict[str, dict[int, LayerSums]]) -> None:
    if not found:
        raise ValueError(
            "Nothing was recorded: apply the recorder to a pipeline and run prompts first."
        )


def _searched(search: PAROSearch, layers: dict[int, LayerSums]) -> dict[str, Tensor]:
    check_layers(layers)
    sums = [layers[i] for i in range(len(layers))]
    grid, count, steps = sums[0].run
    bins = sorted(sums[0].calls)
    maps = [x.maps[number] for x in sums for number in bins]
    edge = -(-grid.tokens // search.block) - whole_blocks(grid, search.block)
    keeps = keep_heaviest(maps, search.density, search.mode, search.block)
    kept = [
        (pack(pad(keep, (0, edge, 0, edge), value=True)), *shares_of(x, keep))
        for x, keep in zip(maps, keeps, strict=True)
    ]
    keep, density, mass = (
        torch.stack(x).unflatten(0, (count, len(bins))).transpose(0, 1).contiguous()
        for x in zip(*kept, strict=True)
    )
    numbers = torch.full((steps,), -1, dtype=torch.int16)
    for step in sums[0].seen:
        numbers[step] = bins.index(search.bin_of(step, steps))
    covered = torch.stack([x.metrics[2] / x.measured for x in sums])
    return {
        "order": torch.stack([x.choice for x in sums]).to(torch.int8),
        "bin": numbers,
        "keep": keep,
        "density": density,
        "kept_mass": mass,
        "coverage": covered.mT[..., list(distinct_orders(grid)[1])].float(),
    }
