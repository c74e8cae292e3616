"""What each head loses if it lives on an earlier dense step: what `vdit-sparse tune` measures."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vdit_sparse.call import Call
from vdit_sparse.eval.calibrators.paro_tiles import (
    coverage,
    distinct_orders,
    sample_rows,
    tile_statistics,
)
from vdit_sparse.kernels.block_mask import BLOCK_SIZES, BlockMask
from vdit_sparse.kernels.block_sparse import block_sparse_attention
from vdit_sparse.kernels.reorder import reorder
from vdit_sparse.method import Plan, SparseAttention, check_choice, real_keys
from vdit_sparse.orders import AXES, axis_order
from vdit_sparse.tuned import TunedAttention, heaviest, order_of


@dataclass(frozen=True, kw_only=True)
class TuneSearch:
    """What is measured before `eval.tune_allocate` decides.

    All prompts run twice, dense. In the first pass `order_steps` steps show in which order of the
    axes a head has most of its probability in the heaviest tenth of its tiles. In the second, at
    every step t, each head's output is compared with what it would be if its last dense step had
    been t - 1, t - 2, ... t - `reach`, for every density: see `TunedAttention`.

    block: tokens of a block. densities: kept shares of a head's blocks that it may have between
    dense steps, ascending from 0 to below 1. reach: the most steps between two dense ones of a
    head. rows: of how many query blocks of a head outputs are compared, one from each of so many
    equal stretches; so much of R is held for every layer, branch, density and step in reach.
    Raises ValueError for a field out of range.
    """

    block: int = 64
    densities: tuple[float, ...] = (0.0, 0.04, 0.08, 0.12, 0.17, 0.25, 0.35, 0.5)
    reach: int = 15
    rows: int = 64
    order_steps: int = 4

    method: ClassVar[type[SparseAttention]] = TunedAttention

    def __post_init__(self):
        check_choice("block", self.block, BLOCK_SIZES)
        given = tuple(self.densities)
        rising = all(low < high for low, high in zip(given, given[1:], strict=False))
        if not given or not rising or not 0 <= given[0] <= given[-1] < 1:
            raise ValueError(f"densities must ascend from 0 to below 1, got {self.densities!r}.")
        for name in ("reach", "rows", "order_steps"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")

    def recorder(self) -> "TuneRecorder":
        """An empty recorder, for `eval.calibrate.calibrate`."""
        return TuneRecorder(search=self, block=self.block)

    def measured_steps(self, steps: int) -> set[int]:
        """The steps of a run of `steps` at which orders are compared."""
        gap = (steps - 1) / max(self.order_steps - 1, 1)
        return {round(i * gap) for i in range(self.order_steps)}


@dataclass(eq=False)
class Layer:
    """What one layer of one expert has shown.

    covered: fp64 `[orders, H]`, summed; order: index in `AXES` of each head; steps: those seen in
    the second pass; sums: by (dense step, step, level) fp64 `[3, H]`; kept: by level, the share of
    blocks, summed over `times` calls.
    """

    covered: Tensor | float = 0.0
    order: list[int] | None = None
    steps: set[int] = field(default_factory=set)
    sums: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    kept: Tensor | float = 0.0
    times: int = 0


@dataclass(eq=False)
class Former:
    """A dense step that a head may live on: for each level its mask, rho and R of the rows."""

    step: int
    levels: list[tuple[BlockMask, Tensor, Tensor]]


@dataclass(eq=False)
class Record:
    """What a recorder has seen: the number of the pass, and the layers of each expert."""

    number: int = 0
    experts: dict[str, dict[int, Layer]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TuneRecorder(SparseAttention):
    """Dense attention that measures what `TuneSearch` says, in two passes over the same runs."""

    passes: ClassVar[int] = 2

    search: TuneSearch
    record: Record = field(default_factory=Record, compare=False, repr=False)

    def begin(self, number: int) -> None:
        """Starts a pass; the second one takes the orders that the first has shown best."""
        self.record.number = number
        if number == 0:
            self.record.experts.clear()
        for layers in self.record.experts.values():
            for layer in layers.values():
                layer.order, layer.steps = layer.covered.argmax(0).tolist(), set()

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        """All blocks: a recorder is dense."""
        return Plan(BlockMask.full(q.shape[2], block=self.block, device=q.device))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Dense attention of q, k, v `[B, H, S, D]`."""
        if call.steps is None or call.grid.video < self.block:
            raise ValueError(
                "Tuning needs the number of denoising steps (use vdit_sparse.apply on a pipeline) "
                f"and a video of at least {self.block} tokens, got steps {call.steps}, {call.grid}."
            )
        call.note.density = 1.0
        layer = self.record.experts.setdefault(call.origin.expert, {}).setdefault(
            call.layer, Layer()
        )
        if self.record.number == 1:
            self._measure(layer, q, k, v, call)
        elif call.step in self.search.measured_steps(call.steps) or not layer.steps:
            layer.steps.add(call.step)
            layer.covered = layer.covered + self._covered(q, k, v, call)
        return scaled_dot_product_attention(q, k, v, real_keys(call.kv_len, k))

    def result(self) -> dict[str, Tensor]:
        """What was measured, on the CPU, as "<expert>.<name>": "step" int16 `[n]`; "order" int8
        `[L, H]`; "kept" fp64 `[levels]`, the share of blocks; "sums" fp32
        `[n, reach, levels, 3, L, H]`, at [i, j] of step i + 1 + j living on dense step i: with o
        the dense output, m and c that without and with the whole of what the dense step left, the
        sums over rows, channels, batch rows, branches and runs of (o - m)^2, (o - m)(c - m) and
        (c - m)^2. Raises ValueError if a pass was not recorded."""
        if self.record.number != 1:
            raise ValueError("Only orders were measured: call begin(1) and run the prompts again.")
        return {
            f"{expert}.{name}": x
            for expert, layers in self.record.experts.items()
            for name, x in self._result(layers).items()
        }

    def _covered(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """The share of each head's probability in its heaviest tenth of tiles, fp64
        `[orders, H]`, -inf for an order that is another one on this grid."""
        full = BlockMask.full(q.shape[2], block=128, device=q.device)
        lse = block_sparse_attention(q, k, v, full, kv_len=call.kv_len)[1]
        tiles = call.grid.video // self.block
        rows = self._rows(tiles, call)
        found = torch.full((len(AXES), q.shape[1]), -torch.inf, dtype=torch.float64)
        for axes in distinct_orders(call.grid)[0]:
            order = axis_order(call.grid, axes, q.device)[: tiles * self.block]
            seen = order.view(tiles, self.block)[rows].flatten()
            parts = (reorder(q, seen), reorder(k, order), reorder(lse, seen))
            shares = [self._coverage(*head) for head in zip(*(x[0] for x in parts), strict=True)]
            found[AXES.index(axes)] = torch.stack(shares).double().cpu()
        return found

    def _coverage(self, q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
        return coverage(tile_statistics(q, k, lse, self.block, None, False)[0])

    def _rows(self, tiles: int, call: Call) -> Tensor:
        """The query blocks of a layer that are looked at, the same ones in all runs."""
        seeded = torch.Generator().manual_seed(call.layer)
        return sample_rows(tiles, self.search.rows, seeded).unique()

    def _measure(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor, call: Call) -> None:
        """Compares with all dense steps in reach, and is one for those to come."""
        layer.steps.add(call.step)
        order = order_of(layer.order, call.grid, q.device)
        if order is None:
            order = torch.arange(q.shape[2], device=q.device).expand(q.shape[1], -1)
        tiles = call.grid.video // self.block
        rows = self._rows(tiles, call).to(q.device)
        seen = order[:, : tiles * self.block].unflatten(1, (tiles, self.block))[:, rows].flatten(1)
        q, k, v = reorder(q, seen), reorder(k, order), reorder(v, order)
        full = BlockMask.full(q.shape[2], k.shape[2], self.block, device=q.device)
        out, lse = block_sparse_attention(q, k, v, full, kv_len=call.kv_len)
        formers = call.memory.setdefault("formers", [])
        if formers and formers[-1].step == call.step:  # a solver may call twice at a step
            formers.pop()
        for former in formers:
            for level, compared in enumerate(self._compare(former, q, k, v, out, call)):
                place = (former.step, call.step, level)
                layer.sums[place] = layer.sums.get(place, 0) + compared
        levels = list(self._levels(q, k, v, (out, lse), call))
        shares = torch.stack([mask.kept_share for mask, _, _ in levels])
        whole = tiles / -(-k.shape[2] // self.block)  # the other rows are kept whole
        layer.kept = layer.kept + (1 - whole + whole * shares)
        layer.times += 1
        formers.append(Former(call.step, levels))
        del formers[: -self.search.reach]

    def _levels(self, q, k, v, dense, call: Call) -> Iterator[tuple[BlockMask, Tensor, Tensor]]:
        """Mask, rho and R of each level, this call being the dense step."""
        out, lse = dense
        mass = _row_mass(q, k, lse, self.block)
        for density in self.search.densities:
            keep = heaviest(mass, density, self.block, call.grid)
            mask = BlockMask.from_keep(keep, self.block)
            band, less = block_sparse_attention(q, k, v, mask, kv_len=call.kv_len)
            rho = (less - lse).exp_().clamp_(max=1)[..., None]
            yield mask, rho, (out.float() - rho * band.float()).to(q.dtype)

    def _compare(self, former: Former, q, k, v, out, call: Call) -> Iterator[Tensor]:
        """The three sums fp64 `[3, H]` of each level; see `result`."""
        for mask, rho, residual in former.levels:
            band = block_sparse_attention(q, k, v, mask, kv_len=call.kv_len)[0].float()
            gap = out.float() - band
            back = (rho - 1) * band + residual.float()
            sums = (gap * gap, gap * back, back * back)
            yield torch.stack([x.sum((0, 2, 3), dtype=torch.float64) for x in sums])

    def _result(self, layers: dict[int, Layer]) -> dict[str, Tensor]:
        ordered = [layers[i] for i in range(len(layers))]
        steps = sorted(ordered[0].steps)
        if any(layer.steps != ordered[0].steps for layer in ordered):
            raise ValueError(
                "Not every layer was recorded at the same steps: run the prompts to their end, "
                "without dense layers and caches that skip layers."
            )
        n, levels = len(steps), len(self.search.densities)
        heads = len(ordered[0].order)
        sums = torch.zeros(n, self.search.reach, levels, 3, len(ordered), heads)
        for number, layer in enumerate(ordered):
            for (dense, step, level), value in layer.sums.items():
                i = steps.index(dense)
                sums[i, steps.index(step) - i - 1, level, :, number] = value.float().cpu()
        kept = sum(layer.kept / layer.times for layer in ordered) / len(ordered)
        return {
            "step": torch.tensor(steps, dtype=torch.int16),
            "order": torch.tensor([layer.order for layer in ordered], dtype=torch.int8),
            "kept": kept.double().cpu(),
            "sums": sums,
        }


def _row_mass(q: Tensor, k: Tensor, lse: Tensor, block: int) -> Tensor:
    """Mass of each key block in some rows of query blocks, fp32 `[B, H, rows, nb]`."""
    keys = -k.shape[2] % block
    k = torch.nn.functional.pad(k, (0, 0, 0, keys))
    heads = zip(*(x.flatten(0, 1) for x in (q, k, lse)), strict=True)
    mass = [tile_statistics(*head, block, None, False)[0] for head in heads]
    return torch.stack(mass).unflatten(0, q.shape[:2])
