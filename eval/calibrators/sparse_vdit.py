"""The offline search of Sparse-vDiT: one mode for each step, layer and head, on a few samples."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import ClassVar

import torch
from torch import Tensor

from vdit_sparse.grid import Grid
from vdit_sparse.kernels.block_mass import block_mass
from vdit_sparse.method import (
    Call,
    Plan,
    SparseAttention,
    check_choice,
    check_number,
    execute,
    real_keys,
)
from vdit_sparse.methods.sparse_vdit import (
    FULL,
    MODES,
    STRIPE,
    Patterns,
    SparseVDiTAttention,
    mask_of,
    mode_masks,
    order_of,
    stripe_count,
)

TIMED_RUNS = 3
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, kw_only=True)
class SparseVDiTSearch(Patterns):
    """Appendix algorithm 1 of Sparse-vDiT, arXiv 2506.03065: greedy, on the trajectory.

    Every call computes all five modes on its own q, k, v; a head's loss in mode i = 1 to 4 is
    L_i = e_i + penalty * cost_i. The call goes on with the output of the modes that its own losses
    choose (so both CFG branches decide for themselves, on the mean over their batch rows). In the
    end losses are averaged over samples and branches and decided once: mode 0 if every L_i is above
    `epsilon`, else that of least L_i, of equal ones the cheaper, then the lower.

    penalty: the paper's lambda, at least 0. epsilon: at least 0, or infinity for no full heads;
        in units of e, which are ours and not the paper's.
    target: mean density over all searched steps, layers and heads at which to end (ours): the
        final decision then takes the smallest epsilon that reaches it, or the nearest; the
        trajectory keeps to `epsilon`. None: `epsilon` decides.
    loss: "relative": e_i = |O_i - O_0|^2 / |O_0|^2 of the head. Skipping would always have e = 1,
        so that its e is |O_0|^2 over the mean of that of the layer's heads: a head that adds little
        beside the others may go. "absolute": that mean is the denominator of all modes. The
        paper's MSE has no stated scale.
    cost: "time": milliseconds of all heads in the mode over those of all in mode 0, through the
        kernel of the method, the median of three runs at the first call of each shape. "blocks":
        the kept share of key blocks, the paper's 1 - S_i (its appendix prints S_i, which would
        punish sparsity).

    Searched stripes, which the paper leaves open, are for each layer and head the key blocks with
    most attention mass from all video queries, summed over all steps, samples and branches; during
    the search, summed so far. There are as many as the longest text leaves of `density`. The other
    fields are those of `Patterns`. Raises ValueError for a field out of range.
    """

    method: ClassVar[type[SparseAttention]] = SparseVDiTAttention

    penalty: float = 0.5
    epsilon: float = 0.4
    target: float | None = None
    loss: str = "relative"
    cost: str = "time"

    def __post_init__(self):
        super().__post_init__()
        for name, high in (("penalty", "a finite number"), ("epsilon", "a number or infinity")):
            value = getattr(self, name)
            finite = value != math.inf or name == "epsilon"
            if type(value) not in (int, float) or not value >= 0 or not finite:
                raise ValueError(f"{name} must be {high} of at least 0, got {value!r}.")
        if self.target is not None:
            check_number("target", self.target, 0, 1)
        check_choice("loss", self.loss, ("relative", "absolute"))
        check_choice("cost", self.cost, ("time", "blocks"))

    def recorder(self) -> "SparseVDiTRecorder":
        """A fresh recorder: apply it to the pipeline, run the prompts, ask for its `result`."""
        return SparseVDiTRecorder(search=self, block=self.block)

    def decide(
        self, losses: Tensor, costs: Tensor, epsilon: float | Tensor | None = None
    ) -> Tensor:
        """Modes int64 `[...]` for losses `[..., 4]` of modes 1 to 4; costs: `[5]` on the CPU."""
        cheapest = costs[1:].argsort(stable=True).to(losses.device)
        best = cheapest[losses[..., cheapest].argmin(-1)] + 1
        limit = self.epsilon if epsilon is None else epsilon
        return torch.where((losses <= limit).any(-1), best, FULL)

    def settle(self, losses: Tensor, costs: Tensor, densities: Tensor) -> Tensor:
        """The final modes int64 `[...]`; densities: `[5]` of each mode. Heads with NaN do not
        count towards `target`."""
        if self.target is None:
            return self.decide(losses, costs)
        least = losses.amin(-1)
        saved = 1 - densities[self.decide(losses, costs, math.inf)]
        order = least.flatten().argsort(stable=True)[: int((~least.isnan()).sum())]
        reached = 1 - saved.flatten()[order].cumsum(0) / len(order)
        enough = int((reached > self.target).sum())
        limit = least.flatten()[order[min(enough, len(order) - 1)]]
        return self.decide(losses, costs, limit)


@dataclass(eq=False)
class Record:
    """What a recorder has seen: sums of losses `[H, 4]` and how many by (expert, step, layer), mass
    of the video's key blocks `[H, nk]` and the grid of the longest text by (expert, layer);
    milliseconds, costs and densities `[5]` by shape; (grid without text, layers, steps)."""

    losses: dict[tuple[str, int, int], tuple[Tensor, int]] = field(default_factory=dict)
    mass: dict[tuple[str, int], tuple[Tensor, Grid]] = field(default_factory=dict)
    costs: dict[tuple, tuple[Tensor | None, Tensor, Tensor]] = field(default_factory=dict)
    run: tuple[Grid, int, int] | None = None

    def check(self, call: Call) -> None:
        """Raises ValueError if a call has another video size or number of steps than the first."""
        if call.steps is None:
            raise ValueError(
                "A calibration needs the number of denoising steps, which a bare transformer does "
                "not know: use vdit_sparse.apply on the pipeline."
            )
        run = (replace(call.grid, text=0), call.layers, call.steps)
        if self.run not in (None, run):
            raise ValueError(
                f"All samples of a calibration need one grid, number of layers and of steps; the "
                f"first had {self.run}, this one {run}."
            )
        self.run = run


@dataclass(frozen=True, kw_only=True)
class SparseVDiTRecorder(SparseAttention):
    """Computes every mode at every call and writes down their losses; see `SparseVDiTSearch`.

    Unlike a method it holds state, in `record`, and serves one search only.
    """

    search: SparseVDiTSearch
    record: Record = field(default_factory=Record, repr=False, compare=False)

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        """The plan of mode 0, against which the others are measured."""
        return _uniform_plan(FULL, call.grid, self.search, q.device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """The output of the modes that this call's own losses choose."""
        self.record.check(call)
        how = {"kv_len": call.kv_len, "precision": self.precision, "backend": self.backend}
        run = partial(execute, q, k, v, **how)
        dense, lse = run(self.plan(q, k, call))
        plans = self._plans(self._columns(q, k, lse, call), call.grid, q.device)
        outs = [run(plan)[0] for plan in plans[1:]]
        costs = self._costs(run, plans, q, call.grid)
        losses = _errors(dense, outs, self.search.loss, call.kv_len)
        losses += self.search.penalty * costs[1:].to(q.device)
        place = (call.origin.expert, call.step, call.layer)
        total, count = self.record.losses.get(place, (0, 0))
        self.record.losses[place] = total + losses, count + 1
        call.note.density, call.note.searched = 1.0, True
        modes = self.search.decide(losses, costs)
        for mode, out in enumerate(outs, 1):
            dense = torch.where((modes == mode)[:, None, None], out, dense)
        return dense

    def result(self) -> dict[str, Tensor]:
        """What was found, on the CPU, for each expert:

        "<expert>.modes": int8 `[steps, layers, H]`, -1 where the expert did not run;
        "<expert>.losses": fp32 `[steps, layers, H, 4]`, mean L of modes 1 to 4, NaN where not run;
        "<expert>.stripes": int32 `[layers, H, c]`, ascending key blocks, if stripes are searched;
        "<expert>.milliseconds": fp32 `[5]`, of one call with all heads in a mode, if timed.

        Raises RuntimeError if nothing ran.
        """
        if not self.record.losses:
            raise RuntimeError("Nothing was recorded: apply the recorder and run the pipeline.")
        found = {}
        for expert in sorted({expert for expert, _, _ in self.record.losses}):
            for name, tensor in self._result_of(expert).items():
                found[f"{expert}.{name}"] = tensor.cpu().contiguous()
        return found

    def _result_of(self, expert: str) -> dict[str, Tensor]:
        _, layers, steps = self.record.run
        means = {
            (step, layer): (total / count).cpu()
            for (name, step, layer), (total, count) in self.record.losses.items()
            if name == expert
        }
        heads = len(next(iter(means.values())))
        losses = torch.full((steps, layers, heads, 4), torch.nan)
        for place, mean in means.items():
            losses[place] = mean
        milliseconds, costs, densities = next(iter(self.record.costs.values()))
        modes = self.search.settle(losses, costs, densities).masked_fill(losses.isnan().any(-1), -1)
        found = {"modes": modes.to(torch.int8), "losses": losses}
        if self.search.stripes == "searched":
            masses = [self.record.mass[expert, layer] for layer in range(layers)]
            count = min(stripe_count(grid, self.search) for _, grid in masses)
            columns = [_top_columns(*each, self.search, count) for each in masses]
            found["stripes"] = torch.stack(columns)
        if milliseconds is not None:
            found["milliseconds"] = milliseconds
        return found

    def _columns(self, q: Tensor, k: Tensor, lse: Tensor, call: Call) -> Tensor | None:
        """Adds this call's mass to that of its layer; the stripes of all mass so far."""
        if self.search.stripes == "static":
            return None
        grid, block, place = call.grid, self.search.block, (call.origin.expert, call.layer)
        mass = block_mass(q, k, lse, block)
        rows = grid.video // block if grid.text else mass.shape[2]
        mass = mass[:, :, :rows, : -(-grid.video // block)].sum((0, 2))
        total, longest = self.record.mass.get(place, (0, grid))
        longest = max(longest, grid, key=lambda each: each.text)
        self.record.mass[place] = total + mass, longest
        return _top_columns(total + mass, grid, self.search, stripe_count(grid, self.search))

    def _plans(self, columns: Tensor | None, grid: Grid, device: torch.device) -> list[Plan]:
        """A plan for each mode with all heads in it."""
        plans = [_uniform_plan(mode, grid, self.search, device) for mode in range(len(MODES))]
        if columns is not None:
            mask = mask_of(torch.tensor([STRIPE]), columns, grid, self.search, device)
            plans[STRIPE] = Plan(mask)
        return plans

    def _costs(self, run: Callable, plans: list[Plan], q: Tensor, grid: Grid) -> Tensor:
        """Cost of each mode beside mode 0, `[5]` on the CPU; found once for each shape."""
        shape = (grid, q.shape, q.dtype, q.device)
        if shape not in self.record.costs:
            milliseconds = None
            if self.search.cost == "time":
                times = [_milliseconds(partial(run, plan), q.device) for plan in plans]
                milliseconds = torch.tensor(times)
            densities = torch.tensor([plan.mask.density() for plan in plans])
            costs = densities if milliseconds is None else milliseconds / milliseconds[FULL]
            self.record.costs[shape] = (milliseconds, costs, densities)
        return self.record.costs[shape][1]


@lru_cache(maxsize=32)
def _uniform_plan(mode: int, grid: Grid, patterns: Patterns, device: torch.device) -> Plan:
    """The plan of any number of heads in `mode`, without searched stripes."""
    with torch.inference_mode(False):
        modes = torch.tensor([mode])
        mask = mask_of(modes, None, grid, patterns, device)
        return Plan(mask, order_of(modes, grid, device))


def _errors(dense: Tensor, outs: list[Tensor], loss: str, kv_len: Tensor | None) -> Tensor:
    """e of modes 1 to 4, fp32 `[H, 4]`, the mean over batch rows; outs: `[B, H, S, D]` of each, of
    which rows of padding do not count."""
    rows = 1 if kv_len is None else real_keys(kv_len, dense)[:, :, 0]
    energy, *errors = (
        (torch.linalg.vector_norm(x, dim=3, dtype=torch.float32).square() * rows).sum(2)
        for x in (dense, *(out - dense for out in outs))
    )
    layer = energy.mean(1, keepdim=True).clamp(min=TINY)
    own = layer if loss == "absolute" else energy.clamp(min=TINY)
    scales = [layer, own, own, own]
    return torch.stack([e / s for e, s in zip(errors, scales, strict=True)], -1).mean(0)


def _top_columns(mass: Tensor, grid: Grid, patterns: Patterns, count: int) -> Tensor:
    """The `count` key blocks of most mass `[..., nk]` that stripes do not have anyway, int32
    `[..., count]` ascending; of equal ones the first."""
    always = mode_masks(grid, patterns)[STRIPE].all(0)[: mass.shape[-1]].to(mass.device)
    ranked = mass.masked_fill(always, -1).argsort(dim=-1, descending=True, stable=True)
    return ranked[..., :count].sort(-1).values.to(torch.int32)


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Median wall time of a call, waiting for the device, after one that compiles."""
    times = []
    for _ in range(TIMED_RUNS + 1):
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
