"""The hook that owns all state of a run, and the processors that bring q, k, v to it."""

import inspect
import itertools
import weakref
from dataclasses import replace
from typing import NamedTuple

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import StateManager
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from vdit_sparse.call import Call, Note, Origin
from vdit_sparse.grid import Grid
from vdit_sparse.kernels.block_mask import BLOCK_SIZES, BlockMask
from vdit_sparse.kernels.block_sparse import choose_backend, explain
from vdit_sparse.method import SparseAttention
from vdit_sparse.pipelines.clock import Clock
from vdit_sparse.pipelines.families import Family
from vdit_sparse.pipelines.report import Entry, Stopwatch

# A compiled block knows its run by number: an int is a guard that never changes.
_RUNS: weakref.WeakValueDictionary[int, "Run"] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class Place(NamedTuple):
    """Where the model call in progress is."""

    grid: Grid
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
        _RUNS[self.number] = self
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
        grid = self.family.grid(module, given.arguments)
        timestep = given.arguments["timestep"]
        self.clock.check(grid)
        branch = self.clock.tick(self.expert, self.context._context, timestep)
        if self.clock_run != self.clock.run:
            self.clock_run = self.clock.run
            self._memory.clear()
            self.entries, self.backend, self.calibration = [], None, None
        self._place = Place(grid, branch, self.clock.step, self.clock.steps)
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

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of one layer: query, key, value `[B, S, H, D]` -> contiguous `[B, S, H, D]`."""
        if self._place is None:
            raise RuntimeError(
                "A sparse self-attention layer was called outside of its transformer's forward, "
                "where grid and step are unknown; call the whole transformer."
            )
        grid, branch, step, steps = self._place
        memory = self._memory.setdefault((branch, layer), {})
        note = Note(watch=self.watch)
        place = (grid, layer, len(self.processors), step, steps)
        call = Call(*place, memory, self.origin, note)
        processor = self.processors[layer]
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        dense = self.method.is_dense(call)
        if not dense:
            self._check_sparse(processor, q, k, v)
        started = self.watch.start(query.device) if self.watch else None
        out = self.method(q, k, v, call, processor.dense)
        mark = self.watch.stop(started) if self.watch else None
        self.calibration = note.calibration or self.calibration
        entry = Entry(self.expert, branch, step, layer, dense, note.density, note.searched)
        self.entries.append(replace(entry, milliseconds=mark, plans=tuple(note.plans)))
        return out.transpose(1, 2).contiguous()

    def _check_sparse(self, processor: "SparseAttnProcessor", q: Tensor, k: Tensor, v: Tensor):
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


class SparseAttnProcessor:
    """Base of the families' processors: a stock processor whose attention goes through the run.

    A subclass defines `__call__` with the stock processor's argument names (diffusers drops
    others), brings query, key, value `[B, S, H, D]` to `attend`, and continues as stock does.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, run: Run, layer: int):
        self.run = run.number
        # A tensor, not an int: one compiled graph serves all layers.
        self.layer = torch.tensor(layer)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Dense or sparse attention `[B, S, H, D]` -> `[B, S, H, D]`, as the method decides."""
        if torch.is_grad_enabled() and query.requires_grad:
            raise RuntimeError(
                "vdit_sparse is inference only, but the model runs under autograd; use "
                "torch.no_grad(), or vdit_sparse.remove(...) to train."
            )
        return torch.ops.vdit_sparse.attend(query, key, value, self.layer, self.run)

    def dense(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The stock attention, through diffusers' dispatcher: `[B, H, S, D]` -> `[B, H, S, D]`."""
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        out = dispatch_attention_fn(
            query,
            key,
            value,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return out.transpose(1, 2)


@torch.library.custom_op("vdit_sparse::attend", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor, layer: Tensor, run: int) -> Tensor:
    return _RUNS[run].attend(int(layer), query, key, value)


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, layer: Tensor, run: int) -> Tensor:
    return query.new_empty(query.shape)
