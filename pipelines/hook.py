"""The hook that owns all state of a run."""

import inspect
import itertools
from dataclasses import replace
from typing import NamedTuple

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import StateManager
from torch import Tensor
from torch.distributed import ProcessGroup

from vdit_sparse.call import Call, Heads, Note, Origin
from vdit_sparse.grid import Grid
from vdit_sparse.kernels.block_mask import BLOCK_SIZES, BlockMask
from vdit_sparse.kernels.block_sparse import choose_backend, explain
from vdit_sparse.method import SparseAttention
from vdit_sparse.pipelines.clock import Clock
from vdit_sparse.pipelines.families import Family
from vdit_sparse.pipelines.processor import RUNS, SparseAttnProcessor
from vdit_sparse.pipelines.report import Entry, Stopwatch
from vdit_sparse.pipelines.sequence import VideoFirst
from vdit_sparse.pipelines.spot_check import SpotCheck
from vdit_sparse.pipelines.ulysses import (
    Exchange,
    LocalHeads,
    check_split,
    exchange_of,
    is_outermost,
    tensor_parallel_group,
)

_numbers = itertools.count()


class Place(NamedTuple):
    """Where the model call in progress is, the text tokens before its video, and how it is spread
    over GPUs: the exchange of its tokens, or the processes that have a part of its heads."""

    grid: Grid
    lead: int
    branch: str
    step: int
    steps: int | None
    exchange: Exchange | None
    group: ProcessGroup | None


class Run(ModelHook):
    """Root hook of one transformer: reads grid, step and guidance branch off every model call and
    owns the method, the memories and the records of the run in progress.

    diffusers hands its cache context (branch, step) to every `StateManager` attribute of a stateful
    hook, and calls `reset_state` when a pipeline's run ends.
    """

    _is_stateful = True

    def __init__(self, expert: str, family: Family, clock: Clock):
        super().__init__()
        self.expert, self.family, self.clock = expert, family, clock
        self.origin = Origin(expert=expert)
        self.method: SparseAttention | None = None
        self.watch: Stopwatch | None = None
        self.check: SpotCheck | None = None
        self.processors: list[SparseAttnProcessor] = []
        # By path, as they were when ours came: cache-dit puts other blocks in for every call.
        self.layers: dict[str, torch.nn.Module] = {}
        self.replaced: dict[str, object] = {}
        self.number = next(_numbers)
        RUNS[self.number] = self
        self.context = StateManager(state_cls=None)
        self.entries: list[Entry] = []
        self.backend: tuple[str, dict[str, str | None]] | None = None
        self.calibration: str | None = None
        self._place: Place | None = None
        self._memory: dict[tuple[str, int, int, Grid], dict] = {}
        self.clock_run = 0

    def use(
        self, method: SparseAttention, origin: Origin, timed: bool, check: SpotCheck | None
    ) -> None:
        """Takes a method, and where the calls come from; forgets everything about earlier runs."""
        self.method, self.origin, self.check = method, origin, check
        self.watch = Stopwatch() if timed else None
        self.entries, self.backend, self.calibration = [], None, None
        self.reset_state(None)

    # Reading a timestep does not belong into a compiled graph.
    @torch.compiler.disable
    def pre_forward(self, module, *args, **kwargs):
        given = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs)
        family = self.family
        self._check_in_place(module)
        grid = family.grid(module, given.arguments)
        lead = family.lead(module, given.arguments) if family.lead else 0
        self.clock.check(grid)
        timestep = family.timestep(given.arguments)
        branch = self.clock.tick(self.expert, self.context._context, timestep)
        if self.clock_run != self.clock.run:
            self.clock_run = self.clock.run
            self._memory.clear()
            self.entries, self.backend, self.calibration = [], None, None
            if self.check:
                self.check.forget()
        spread = exchange_of(module, family, grid, lead), tensor_parallel_group(module)
        self._place = Place(grid, lead, branch, self.clock.step, self.clock.steps, *spread)
        return args, kwargs

    def lost(self) -> dict[str, object]:
        """The processors of the layers that have ours no more, by path."""
        present = {path: layer.processor for path, layer in self.layers.items()}
        return {
            path: now for path, now in present.items() if getattr(now, "run", None) != self.number
        }

    def _check_in_place(self, module: torch.nn.Module) -> None:
        lost = self.lost()
        if lost:
            path, now = next(iter(lost.items()))
            raise RuntimeError(
                f"{len(lost)} of {len(self.processors)} layers have lost their sparse processor: "
                f"{path} has a {type(now).__name__} (fuse_qkv_projections, an adapter or "
                "set_attn_processor does that). Apply the method again, or remove it."
            )
        check_split(module, self.family)
        if not is_outermost(self, module):
            raise RuntimeError(
                "enable_parallelism came after the method and hides the whole sequence from it: "
                "apply the method again."
            )

    @torch.compiler.disable
    def post_forward(self, module, output):
        self._place = None
        self.clock.done()
        return output

    def reset_state(self, module):
        self._memory.clear()
        self._place = None
        self.context.reset()
        self.clock.end()
        return module

    def is_sparse(self, layer: int) -> bool:
        """Whether the method is sparse in the call of a layer that is being made; False outside of
        a model call, and where processes share its heads and no norm sees all of them."""
        if self._place is None or self._place.group is not None:
            return False
        grid, _, _, step, steps = self._place[:5]
        return not self.method.is_dense(Call(grid, layer, len(self.processors), step, steps, {}))

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attention of one layer: query, key, value `[B, S, H, D]` in the model's order ->
        contiguous `[B, S, H, D]`. mask: as the stock processor gets it. Where the tokens are
        spread over GPUs, these are a part of them, and S is the part's length."""
        if self._place is None:
            raise RuntimeError(
                "A sparse self-attention layer was called outside of its transformer's forward, "
                "where grid and step are unknown; call the whole transformer. If something else "
                "replaced its forward (cache-dit does), that has to come before the method."
            )
        exchange, group = self._place.exchange, self._place.group
        if exchange is not None:
            heads = exchange.heads(query.shape[2])
            whole = exchange.gather(query, key, value)
            out = self._attend(layer, *whole, exchange.mask(mask), heads)
            return exchange.scatter(out, heads.count)
        heads = LocalHeads(group, query.shape[2] * group.size()) if group else Heads()
        return self._attend(layer, query, key, value, mask, heads)

    def _attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        heads: Heads,
    ) -> Tensor:
        """As `attend`, of all tokens; heads: which ones query, key and value have."""
        processor = self.processors[layer]
        started = self.watch.start(query.device) if self.watch else None
        sequence = self._sequence(processor, query, mask)
        call = self._call(layer, sequence, len(query), heads)
        why = self.method.why_dense(call)
        if why:
            out, look = processor.dense(query, key, value, mask), None
        else:
            parts = processor.sparse(query, key, value, mask)
            qkv = tuple(sequence.move(x).transpose(1, 2) for x in parts)
            self._choose_backend(*qkv)
            moved = self.method(*qkv, call)
            out, look = sequence.back(moved.transpose(1, 2)), (qkv, moved)
            out = out[..., : value.shape[-1]]
        mark = self.watch.stop(started) if self.watch else None
        error = self._look(look, call) if look and self.check else None
        self._note(call, why, mark, error)
        return out.contiguous()

    def _look(self, look: tuple, call: Call) -> float | None:
        path = list(self.replaced)[call.layer]
        return self.check.look(path, *look, call, self.method)

    def _note(self, call: Call, why: str | None, mark: object, error: float | None) -> None:
        note, branch = call.note, self._place.branch
        self.calibration = note.calibration or self.calibration
        entry = Entry(
            self.expert, branch, call.step, call.layer, bool(why), note.density, note.searched
        )
        rest = {"milliseconds": mark, "plans": tuple(note.plans), "why": why, "error": error}
        self.entries.append(replace(entry, **rest))

    def _sequence(
        self, processor: SparseAttnProcessor, query: Tensor, mask: Tensor | None
    ) -> VideoFirst:
        grid, lead = self._place[:2]
        if query.shape[1] == grid.video:  # a layer without the text
            grid, lead = replace(grid, text=0), 0
        keys = processor.keys(mask, query)
        if keys is None or not grid.text:
            return VideoFirst(grid, lead)
        real = torch.cat([keys[:, :lead], keys[:, lead + grid.video :]], dim=1)
        return VideoFirst(grid, lead, real)

    def _call(self, layer: int, sequence: VideoFirst, rows: int, heads: Heads) -> Call:
        _, _, branch, step, steps = self._place[:5]
        # Guidance within the batch may end before the run: what was kept has rows too many then.
        # Tiles of several sizes have a state each.
        memory = self._memory.setdefault((branch, layer, rows, sequence.grid), {})
        place = (sequence.grid, layer, len(self.processors), step, steps)
        note = Note(watch=self.watch)
        return Call(*place, memory, self.origin, note, sequence.kv_len, heads)

    def _choose_backend(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        if self.backend is None:
            # Which backend takes a call depends on the device, the dtype, the head size and the
            # block sizes, but not on the lists.
            block, precision = self.method.block or BLOCK_SIZES[0], self.method.precision
            mask = BlockMask.from_keep(torch.ones(1, 1, dtype=torch.bool, device=q.device), block)
            reasons = explain(q, k, v, mask, precision)
            chosen = self.method.backend or choose_backend(q, k, v, mask, precision)
            self.backend = (chosen, reasons)
