"""Looks into one run of a method: what each layer and head visits, and how much mass that holds.

found = inspect(pipe, RadialAttention(), "a cat runs", steps=(4, 12), layers=(0, 9))
found.table("recall")                      # [steps, layers, heads]
found.look(4, 9).maps[0].plan.raster_share()
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vdit_sparse.call import Call, Note
from vdit_sparse.eval.calibrate import run_prompt
from vdit_sparse.eval.denoise import OnStep
from vdit_sparse.eval.inspect_maps import HeadMap, head_map, head_plan, plan_mass, recall
from vdit_sparse.grid import Grid
from vdit_sparse.kernels.block_mask import BLOCK_SIZES, BlockMask
from vdit_sparse.kernels.block_sparse import block_sparse_attention
from vdit_sparse.method import Plan, SparseAttention, real_keys
from vdit_sparse.pipelines.families import DENOISERS, family_of
from vdit_sparse.pipelines.report import Summary

# Of maps that are kept, unless the caller says otherwise.
MOST_BYTES = 2 * 2**30
TABLES = ("density", "recall", "best", "error")


@dataclass(frozen=True, eq=False)
class Look:
    """One attention call of one layer: what `Inspection` says of each of its heads, fp32 `[H]`.

    why: what made the whole call dense: a field of the method, "search" for a pass in which the
    method looks for its plan or fills its cache; None for a sparse call.
    maps: head -> its map, for the chosen layers and heads.
    """

    expert: str
    step: int
    layer: int
    grid: Grid
    why: str | None
    density: Tensor
    recall: Tensor
    best: Tensor
    error: Tensor
    maps: dict[int, HeadMap]


@dataclass(frozen=True, eq=False)
class Inspection:
    """What was seen of one run of a method.

    layers, heads, steps: how many the run had; grid: its tokens; expert: of each step.
    looks: one a layer at each chosen step, in their order.
    densities: mean density of all self-attention of each step, both guidance branches, dense calls
    counting 1; a step that a cache skipped is missing.

    Of each head: density, kept share of key blocks; recall, the mean over queries of the softmax
    weight in the visited blocks; best, the most that as many blocks a row could hold; error,
    |out - dense| / |dense| of the call's own q, k, v. A dense call has 1, 1, 1 and about 0.

    Measured is the prompt's own branch: the first call of a step, and of a batch the last row
    (diffusers puts the negative prompt before the prompt).
    """

    method: str
    prompt: str
    seed: int
    grid: Grid
    layers: int
    heads: int
    steps: int
    looks: tuple[Look, ...]
    densities: dict[int, float]

    @property
    def measured(self) -> tuple[int, ...]:
        """The steps that were measured."""
        return tuple(dict.fromkeys(look.step for look in self.looks))

    def look(self, step: int, layer: int) -> Look:
        """The call of a step and layer. Raises KeyError where it was not measured."""
        for look in self.looks:
            if (look.step, look.layer) == (step, layer):
                return look
        raise KeyError(f"Step {step}, layer {layer} was not measured: {self.measured} were.")

    def table(self, name: str) -> Tensor:
        """One of `TABLES` of all heads, fp32 `[measured steps, layers, heads]`; NaN where nothing
        was measured. Raises ValueError for another name."""
        if name not in TABLES:
            raise ValueError(f"There is no table {name!r}, only {', '.join(TABLES)}.")
        rows = {step: row for row, step in enumerate(self.measured)}
        table = torch.full((len(rows), self.layers, self.heads), torch.nan)
        for look in self.looks:
            values = getattr(look, name)
            table[rows[look.step], look.layer, : len(values)] = values
        return table


@dataclass(frozen=True, kw_only=True)
class Inspector(SparseAttention):
    """Runs a method, its dense calls too, and measures the calls of `steps` beside dense attention.

    steps: measured ones, None for all. layers, heads: whose maps are kept, None for all. most_bytes
    bounds what the maps take; above it the run ends with ValueError.

    Needs a dense pass and one for the mass for each measured call; holds the maps of one head, in
    fp32, beside what is kept. Waits for the device.
    """

    method: SparseAttention
    steps: tuple[int, ...] | None = None
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    most_bytes: int = MOST_BYTES
    seen: list[Look] = field(default_factory=list, compare=False, repr=False)

    @classmethod
    def around(cls, method: SparseAttention, **chosen) -> "Inspector":
        """An inspector of `method`; chosen: the fields above."""
        same = {"block": method.block or BLOCK_SIZES[0], "precision": method.precision}
        return cls(method=method, backend=method.backend, **same, **chosen)

    def why_dense(self, call: Call) -> None:
        """Never: dense calls are looked at too."""
        return None

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        return self.method.plan(q, k, call)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        why, plan, due = self.method.why_dense(call), None, self._is_due(call)
        if why:
            call.note.density = 1.0
            out = scaled_dot_product_attention(q, k, v, real_keys(call.kv_len, k))
        else:
            # A plan that is not cached is asked for once more, before the run remembers it.
            ask = due and self.method.refresh == "each"
            plan = self._ask(q, k, call) if ask else None
            out = self.method.attend(q, k, v, call)
            # Methods that ran dense say so by a number; a plan's density is a tensor.
            dense = isinstance(call.note.density, float) and call.note.density == 1.0
            why = "search" if dense else None
        if due:
            _check("heads", self.heads, q.shape[1])
            used = None if why else call.memory.get("plan") or plan or self._ask(q, k, call)
            self.seen.append(self._measure(q, k, v, out, call, used, why))
        return out

    def _is_due(self, call: Call) -> bool:
        if self.steps is not None and call.step not in self.steps:
            return False
        place = (call.origin.expert, call.step, call.layer)
        return all((look.expert, look.step, look.layer) != place for look in self.seen)

    def _ask(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        return self.method.plan(q, k, replace(call, memory=dict(call.memory), note=Note()))

    def _measure(self, q, k, v, out, call: Call, plan: Plan | None, why: str | None) -> Look:
        row, tokens = len(q) - 1, q.shape[2]
        real = tokens if call.kv_len is None else int(call.kv_len[row])
        q, k, v, out = (x[row:, :, :real] for x in (q, k, v, out))
        everything = BlockMask.full(real, block=self.block, device=q.device)
        dense, lse = block_sparse_attention(q, k, v, everything, backend=self.backend)
        values, maps = [], {}
        for head in range(q.shape[1]):
            own = slice(head, head + 1)
            parts = q[:, own], k[:, own], lse[:, own]
            mine = head_plan(plan or Plan(everything), row, head, tokens if plan else real, real)
            wanted = _holds(self.layers, call.layer) and _holds(self.heads, head)
            mass = plan_mass(*parts, mine) if wanted or not why else None
            both = torch.ones(2) if why else torch.stack(recall(mass, mine.keep))
            values.append((mine.density, *both.tolist()))
            if wanted:
                maps[head] = head_map(*parts, mine, mass)
                self._check_room(maps)
        density, kept, best = torch.tensor(values).T.contiguous()
        grid = replace(call.grid, text=real - call.grid.video)
        place = (call.origin.expert, call.step, call.layer, grid)
        error = _error(out, dense).cpu()
        return Look(*place, why, density, kept, best, error, maps)

    def _check_room(self, maps: dict[int, HeadMap]) -> None:
        kept = [*maps.values(), *(each for look in self.seen for each in look.maps.values())]
        used = sum(each.bytes for each in kept)
        if used > self.most_bytes:
            raise ValueError(
                f"The maps of these layers, heads and steps take more than {self.most_bytes:,} "
                f"bytes ({used:,} so far): choose fewer."
            )


def inspect(
    pipe,
    method: SparseAttention,
    prompt: str,
    seed: int = 0,
    *,
    steps: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    most_bytes: int = MOST_BYTES,
    on_step: OnStep = lambda *_: None,
    **settings,
) -> Inspection:
    """Runs a prompt through a method as far as its latents, and measures it.

    steps: which to measure, None for all; layers, heads: whose maps to keep, None for all. All
        layers and heads of a measured step get their numbers.
    most_bytes: of maps, in host memory. The map of a sequence of n blocks takes 3 n^2 bytes, 5 n^2
        under a token order: 7 kB of the bundled model, 4 MB of Wan 2.1 at 720p (blocks of 64).
    on_step: called as (steps done, steps) after each step, and may raise to end the run.
    settings: the other arguments of the pipeline's call, `num_inference_steps` among them.

    Stock attention is left behind, also after an error. Raises ValueError for a layer, head or step
    that the run does not have and for maps above `most_bytes`, RuntimeError for NaN.
    """
    chosen = {"layers": layers, "steps": steps, "heads": heads}
    chosen = {name: None if x is None else tuple(x) for name, x in chosen.items()}
    _check("layers", chosen["layers"], layers_of(pipe))
    _check("steps", chosen["steps"], {**pipe.generation, **settings}.get("num_inference_steps"))
    inspector = Inspector.around(method, most_bytes=most_bytes, **chosen)
    ran = _run(pipe, inspector, prompt, seed, on_step, settings)
    looks = tuple(sorted(inspector.seen, key=lambda look: (look.step, look.layer)))
    heads = max((len(look.density) for look in looks), default=0)
    run = {"grid": ran.grid, "layers": ran.layers, "heads": heads, "steps": ran.steps}
    return Inspection(str(method), prompt, seed, **run, looks=looks, densities=_by_step(ran))


def layers_of(pipe) -> int:
    """How many self-attention layers each of the pipeline's transformers has."""
    model = next(x for name in DENOISERS if (x := getattr(pipe, name, None)) is not None)
    return len(family_of(model).layers(model))


def heads_of(pipe) -> int | None:
    """How many heads a layer has, None where the layer does not say."""
    model = next(x for name in DENOISERS if (x := getattr(pipe, name, None)) is not None)
    return getattr(next(iter(family_of(model).layers(model).values())), "heads", None)


def _run(
    pipe, inspector: Inspector, prompt: str, seed: int, on_step: OnStep, settings: dict
) -> Summary:
    from vdit_sparse.pipelines.attach import apply, remove, summary

    try:
        # Whether the method can run on the model is told by the method itself.
        apply(pipe, inspector.method)
        apply(pipe, inspector)
        run_prompt(pipe, prompt, seed, on_step, **settings)
        return summary(pipe)
    finally:
        remove(pipe)


def _error(out: Tensor, dense: Tensor) -> Tensor:
    """Relative error of each head, fp32 `[H]`; out and dense `[1, H, S, D]`."""
    out, dense = (x[0].float().flatten(1) for x in (out, dense))
    return (out - dense).norm(dim=1) / dense.norm(dim=1)


def _by_step(ran: Summary) -> dict[int, float]:
    steps: dict[int, list[float]] = {}
    for entry in ran.entries:
        if entry.density is not None:
            steps.setdefault(entry.step, []).append(entry.density)
    return {step: sum(values) / len(values) for step, values in sorted(steps.items())}


def _holds(chosen: tuple[int, ...] | None, number: int) -> bool:
    return chosen is None or number in chosen


def _check(name: str, chosen: tuple[int, ...] | None, count: int | None) -> None:
    wrong = [x for x in chosen or () if x < 0 or (count is not None and x >= count)]
    if wrong:
        raise ValueError(f"{name} must be from 0 to {count - 1}, got {wrong[0]}.")
