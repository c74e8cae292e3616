"""The hook that shares the branches of classifier-free guidance between two processes."""

import inspect

import torch
import torch.distributed as dist
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import StateManager
from torch import Tensor

from vdit_sparse.pipelines.families import Family

# The branch of each of the two processes, by diffusers' name.
BRANCHES = ("cond", "uncond")


class Branches(ModelHook):
    """Root hook of one transformer: each of two processes computes one guidance branch.

    Pipelines that call the transformer for each branch name it by their cache context ("cond", then
    "uncond"). The process that skips "cond" returns NaN in the outputs' shapes, and fills them in
    place at "uncond", when both branches change hands; guidance combines them only then. Shapes,
    and whether "uncond" comes at all, are known from the first step of a run, which both compute
    whole. Pipelines that stack the branches in one batch ("cond_uncond") have it halved.
    """

    _is_stateful = True

    def __init__(self, family: Family, group: dist.ProcessGroup):
        super().__init__()
        self.family, self.group = family, group
        self.context = StateManager(state_cls=None)
        self.reset_state(None)

    def reset_state(self, module):
        """A new run begins."""
        self.context.reset()
        self._timestep: float | None = None
        self._both = False  # the step before had both branches
        self._sharing = False  # the step in progress is shared
        self._cond: tuple[Tensor, ...] | None = None
        return module

    def new_forward(self, module, *args, **kwargs):
        """Computes a branch, or waits for the other process to."""
        given = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs)
        name = self.context._context.name if self.context._context else None
        if name in BRANCHES:
            return self._one_of_two(name, given.arguments, args, kwargs)
        rows = given.arguments.get("hidden_states")
        if isinstance(rows, Tensor) and len(rows) % 2 == 0:
            return self._half(len(rows), args, kwargs)
        if name is None:
            raise ValueError(
                "cfg_parallel shares a batch of two branches, or branches that the pipeline names; "
                f"{type(module).__name__} was called for one that has no name. Turn guidance on, "
                "or leave cfg_parallel out."
            )
        return self.fn_ref.original_forward(*args, **kwargs)

    def _one_of_two(self, name: str, arguments: dict, args: tuple, kwargs: dict):
        if name == "cond":
            timestep = float(self.family.timestep(arguments).max())
            falls = self._timestep is not None and timestep < self._timestep
            self._sharing, self._both = falls and self._both, False
            self._timestep = timestep
        own = BRANCHES.index(name) == self.group.rank()
        if own or not self._sharing:
            out = self._tensors(args, kwargs)
        else:
            # Whoever reads them before they are filled does not read numbers.
            out = tuple(torch.full_like(x, torch.nan) for x in self._cond)
        if name == "cond":
            self._cond = out
            return out
        if self._sharing:
            for source, tensors in enumerate((self._cond, out)):
                for tensor in tensors:
                    dist.broadcast(tensor, group=self.group, group_src=source)
        self._both, self._sharing = True, False
        return out

    def _half(self, rows: int, args: tuple, kwargs: dict) -> tuple[Tensor, ...]:
        """The outputs of a batch, of which each process computes half."""

        def half(x):
            if isinstance(x, dict):
                return {name: half(each) for name, each in x.items()}
            if isinstance(x, list | tuple):
                return type(x)(half(each) for each in x)
            whole = isinstance(x, Tensor) and x.ndim and len(x) == rows
            return x.chunk(2)[self.group.rank()] if whole else x

        return tuple(self._joined(x) for x in self._tensors(half(args), half(kwargs)))

    def _joined(self, x: Tensor) -> Tensor:
        whole = x.new_empty(2 * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(whole, x.contiguous(), group=self.group)
        return whole

    def _tensors(self, args, kwargs: dict) -> tuple[Tensor, ...]:
        out = self.fn_ref.original_forward(*args, **kwargs)
        if type(out) is not tuple:
            raise ValueError(
                f"cfg_parallel expects a tuple of tensors, got {type(out).__name__}: call the "
                "transformer with return_dict=False, as pipelines do."
            )
        return tuple(x.contiguous() for x in out)
