"""The hook that owns all state of a run."""

import inspect
import itertools
from dataclasses import replace
from typing import NamedTuple

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import StateManager
from torch import Tensor

from vdit_sparse.call import Call, Note, Origin
from vdit_sparse.grid import Grid
from vdit_sparse.kernels.block_mask import BLOCK_SIZES, BlockMask
from vdit_sparse.kernels.block_sparse import choose_backend, explain
from vdit_sparse.method import SparseAttention
from vdit_sparse.pipelines.clock import Clock
from vdit_sparse.pipelines.families import Family
from vdit_sparse.pipelines.processor import RUNS, SparseAttnProcessor
from vdit_sparse.pipelines.report import Entry, Stopwatch
from vdit_sparse.pipelines.sequence import VideoFirst

_numbers = itertools.count()


class Place(NamedTuple):
    """Where the model call in progress is, and the text tokens before its video."""

    grid: Grid
    lead: int
    branch: str
    step: int
    steps: int | None


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
        self.processors: list[SparseAttnProcessor] = []
        self.replaced: dict[str, object] = {}
        self.number = next(_numbers)
        RUNS[self.number] = self
        self.context = StateManager(state_cls=None)
        self.entries: list[Entry] = []
        self.backend: tuple[str, dict[str, str | None]] | None = None
        self.calibration: str | None = None
        self._place: Place | None = None
        self._memory: dict[tuple[str, int], dict] = {}
        self.clock_run = 0

    def use(self, method: SparseAttention, origin: Origin, timed: bool) -> None:
        """Takes a method, and where the calls come from; forgets everything about earlier runs."""
        self.method, self.origin = method, origin
        self.watch = Stopwatch() if timed else None
        self.entries, self.backend, self.calibration = [], None, None
        self.reset_state(None)

    # Reading a timestep does not belong into a compiled graph.
    @torch.compiler.disable
    def pre_forward(self, module, *args, **kwargs):
        given = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs)
        family = self.family
        grid = family.grid(module, given.arguments)
        lead = family.lead(module, given.arguments) if family.lead else 0
        self.clock.check(grid)
        timestep = family.timestep(given.arguments)
        branch = self.clock.tick(self.expert, self.context._context, timestep)
        if self.clock_run != self.clock.run:
            self.clock_run = self.clock.run
            self._memory.clear()
            self.entries, self.backend, self.calibration = [], None, None
        self._place = Place(grid, lead, branch, self.clock.step, self.clock.steps)
        return args, kwargs

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

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attention of one layer: query, key, value `[B, S, H, D]` in the model's order ->
        contiguous `[B, S, H, D]`. mask: as the stock processor gets it."""
        processor = self.processors[layer]
        started = self.watch.start(query.device) if self.watch else None
        sequence = self._sequence(processor, query, mask)
        call = self._call(layer, sequence)
        dense = self.method.is_dense(call)
        if dense:
            out = processor.dense(query, key, value, mask)
        else:
            q, k, v = (sequence.move(x).transpose(1, 2) for x in (query, key, value))
            self._check_sparse(processor, q, k, v)
            out = sequence.back(self.method(q, k, v, call).transpose(1, 2))
        mark = self.watch.stop(started) if self.watch else None
        note, place = call.note, self._place
        self.calibration = note.calibration or self.calibration
        entry = Entry(
            self.expert, place.branch, place.step, layer, dense, note.density, note.searched
        )
        self.entries.append(replace(entry, milliseconds=mark, plans=tuple(note.plans)))
        return out.contiguous()

    def _sequence(
        self, processor: SparseAttnProcessor, query: Tensor, mask: Tensor | None
    ) -> VideoFirst:
        if self._place is None:
            raise RuntimeError(
                "A sparse self-attention layer was called outside of its transformer's forward, "
                "where grid and step are unknown; call the whole transformer."
            )
        grid, lead = self._place[:2]
        if query.shape[1] == grid.video:  # a layer without the text
            grid, lead = replace(grid, text=0), 0
        keys = processor.keys(mask, query)
        if keys is None or not grid.text:
            return VideoFirst(grid, lead)
        real = torch.cat([keys[:, :lead], keys[:, lead + grid.video :]], dim=1)
        return VideoFirst(grid, lead, real)

    def _call(self, layer: int, sequence: VideoFirst) -> Call:
        _, _, branch, step, steps = self._place
        memory = self._memory.setdefault((branch, layer), {})
        place = (sequence.grid, layer, len(self.processors), step, steps)
        note = Note(watch=self.watch)
        return Call(*place, memory, self.origin, note, sequence.kv_len)

    def _check_sparse(self, processor: SparseAttnProcessor, q: Tensor, k: Tensor, v: Tensor):
        if processor._parallel_config is not None:
            raise NotImplementedError(
                "Sparse attention under context parallelism is not supported yet; disable the "
                "parallelism or run dense."
            )
        if self.backend is None:
            # Which backend takes a call depends on the device, the dtype, the head size and the
            # block sizes, but not on the lists.
            block, precision = self.method.block or BLOCK_SIZES[0], self.method.precision
            mask = BlockMask.from_keep(torch.ones(1, 1, dtype=torch.bool, device=q.device), block)
            reasons = explain(q, k, v, mask, precision)
            chosen = self.method.backend or choose_backend(q, k, v, mask, precision)
            self.backend = (chosen, reasons)
