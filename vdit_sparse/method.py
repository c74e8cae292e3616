"""What a method is: it looks at q, k and the place in the run and answers with a plan."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vdit_sparse.call import Call
from vdit_sparse.kernels.block_mask import BLOCK_SIZES, BlockMask
from vdit_sparse.kernels.block_sparse import BACKENDS, PRECISIONS, block_sparse_attention
from vdit_sparse.kernels.reorder import inverse, reorder

Dense = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Plan:
    """Which key blocks each query block visits, and in which token order.

    mask: `BlockMask` over the tokens in plan order.
    order: int64 `[S']` or `[H, S']` or None: new position -> old position, S' >= S, every token
        once; -1 marks a masked slot of a padded region, which must lie past `mask.valid` of its
        key block. None keeps the order of the sequence.
    """

    mask: BlockMask
    order: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class SparseAttention(ABC):
    """Base of all methods: a frozen dataclass that is its own configuration.

    dense_steps, last_dense_steps: the first and last denoising steps run dense; an int, or a float
        in [0, 1) for a fraction of all steps, rounded down.
    dense_layers, last_dense_layers: the first and last layers run dense.
    refresh: when a cached plan is rebuilt: "each" call, "once" a run, every n steps (int), or at
        the listed steps (tuple of int, or of float for fractions of all steps).
    block: tokens of a block, 64 or 128.
    precision: "bf16" computes in the dtype of q, k, v; the 8-bit ones are those of
        `block_sparse_attention`.
    skip_threshold: leave out tiles of small weights in the kernel, see `skipping_attention`: it has
        the bound of the error. With "bf16" only; on a CPU only `backend="reference"` can. No gain
        in time so far: on an H200 7 to 13 % slower than without (docs/performance.md).
    backend: kernel backend, or None for the best one on the device. A named one runs or raises.

    One object serves all layers, both experts of Wan 2.2 and several pipelines at once: it holds
    no state. A subclass writes `plan`, or `attend` if one kernel call is not enough.
    """

    dense_steps: int | float = 0
    last_dense_steps: int | float = 0
    dense_layers: int = 0
    last_dense_layers: int = 0
    refresh: str | int | tuple[int | float, ...] = "each"
    block: int = 128
    precision: str = "bf16"
    skip_threshold: float | None = None
    backend: str | None = None

    def __post_init__(self):
        for name in ("dense_steps", "last_dense_steps"):
            if not _is_step(getattr(self, name)):
                raise ValueError(
                    f"{name} must be an integer of at least 0, or a fraction of the steps from 0 "
                    f"to below 1, got {getattr(self, name)!r}."
                )
        for name in ("dense_layers", "last_dense_layers"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} must be an integer of at least 0, got {value!r}.")
        # A method whose calibration knows the block has None for a default.
        if self.block not in (*BLOCK_SIZES, type(self).block):
            raise ValueError(f"block must be one of {BLOCK_SIZES} tokens, got {self.block!r}.")
        if self.backend is not None:
            check_choice("backend", self.backend, tuple(BACKENDS))
        check_choice("precision", self.precision, PRECISIONS)
        self._check_skipping()
        if isinstance(self.refresh, list):
            object.__setattr__(self, "refresh", tuple(self.refresh))
        if not _is_refresh(self.refresh):
            raise ValueError(
                'refresh must be "each", "once", a number of steps of at least 1 or a list of '
                f"steps, got {self.refresh!r}."
            )

    def _check_skipping(self) -> None:
        if self.skip_threshold is None:
            return
        check_number("skip_threshold", self.skip_threshold, 0, 1)
        if self.precision != "bf16":
            raise ValueError(
                f'skip_threshold goes with precision="bf16", got {self.precision!r}: leave one out.'
            )

    @abstractmethod
    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        """The plan for q, k `[B, H, S, D]` (after norm and RoPE) at this place in the run."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Sparse attention of q, k, v `[B, H, S, D]` -> `[B, H, S, D]`."""
        plan = self.current_plan(q, k, call)
        return self.execute(q, k, v, plan, call)[0]

    def execute(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, call: Call
    ) -> tuple[Tensor, Tensor]:
        """Runs a plan as the fields say: out `[B, H, S, D]` and lse `[B, H, S]`, see `execute`."""
        how = {"precision": self.precision, "skip_threshold": self.skip_threshold}
        return execute(q, k, v, plan, kv_len=call.kv_len, backend=self.backend, **how)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, call: Call, dense: Dense | None = None
    ) -> Tensor:
        """Dense or sparse attention of q, k, v `[B, H, S, D]`, as the four dense fields say.

        `dense(q, k, v)` runs the dense calls; the default is `F.scaled_dot_product_attention` with
        the padding of `call.kv_len` masked. Raises RuntimeError under autograd (this is inference
        only) and ValueError if the sequence is not as long as the grid.
        """
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise RuntimeError(
                f"{type(self).__name__} is inference only, but an input requires gradients; run it "
                "under torch.no_grad()."
            )
        if q.shape[2] != call.grid.tokens:
            raise ValueError(
                f"The grid {call.grid} has {call.grid.tokens} tokens, but q has {q.shape[2]}."
            )
        if not self.is_dense(call):
            return self.attend(q, k, v, call)
        if dense is not None:
            return dense(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, real_keys(call.kv_len, k))

    def is_dense(self, call: Call) -> bool:
        """Whether this call runs dense; raises as `why_dense`."""
        return self.why_dense(call) is not None

    def why_dense(self, call: Call) -> str | None:
        """The field because of which this call runs dense, or None if it does not. Raises
        ValueError if that depends on a number of steps which the caller did not give."""
        if self.last_dense_steps and call.steps is None:
            raise ValueError(
                f"last_dense_steps={self.last_dense_steps} needs the number of denoising steps, "
                "which a bare transformer does not know: use vdit_sparse.apply on the pipeline."
            )
        if call.step < call.step_at(self.dense_steps):
            return "dense_steps"
        if call.layer < self.dense_layers:
            return "dense_layers"
        if call.layer >= call.layers - self.last_dense_layers:
            return "last_dense_layers"
        last = call.step_at(self.last_dense_steps) if self.last_dense_steps else 0
        if last and call.step >= call.steps - last:
            return "last_dense_steps"
        return None

    def current_plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        """The cached plan of this layer and branch, or a new one if `refresh` says so; notes its
        density and the time that building it took."""
        if self.is_due(call):
            with call.note.planning(q.device):
                plan = self.plan(q, k, call)
            self.remember(call, plan)
        else:
            plan = call.memory["plan"]
        call.note.density = plan.mask.kept_share
        return plan

    def is_due(self, call: Call) -> bool:
        """Whether `refresh` asks for a new plan, or none was remembered yet.

        Caches that skip calls may skip a listed step itself, so any listed step since counts.
        """
        built = call.memory.get("built")
        if built is None or self.refresh == "each":
            return True
        if self.refresh == "once":
            return False
        if isinstance(self.refresh, int):
            return call.step - built >= self.refresh
        return any(built < call.step_at(listed) <= call.step for listed in self.refresh)

    def remember(self, call: Call, plan: Plan) -> None:
        """Caches a plan built at this step, unless the next call builds its own anyway."""
        if self.refresh != "each":
            call.memory.update(built=call.step, plan=plan)


def check_choice(name: str, value: object, choices: tuple) -> None:
    """Raises ValueError if the field `name` is none of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}.")


def check_number(name: str, value: object, low: float, high: float) -> None:
    """Raises ValueError if the field `name` is no number above `low` and up to `high`."""
    if type(value) not in (int, float) or not low < value <= high or value == math.inf:
        limit = "" if high == math.inf else f" and at most {high:g}"
        raise ValueError(f"{name} must be a finite number above {low:g}{limit}, got {value!r}.")


def real_keys(kv_len: Tensor | None, k: Tensor) -> Tensor | None:
    """`kv_len` `[B]` as the mask of k `[B, H, S, D]` that SDPA takes: bool `[B, 1, 1, S]`, True for
    real keys, or None."""
    if kv_len is None:
        return None
    return (torch.arange(k.shape[2], device=k.device) < kv_len[:, None])[:, None, None]


def _is_step(value: object) -> bool:
    return (type(value) is int and value >= 0) or (type(value) is float and 0 <= value < 1)


def _is_refresh(refresh: object) -> bool:
    if isinstance(refresh, str):
        return refresh in ("each", "once")
    if isinstance(refresh, tuple):
        return all(_is_step(step) for step in refresh)
    return type(refresh) is int and refresh >= 1


def execute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    *,
    kv_len: Tensor | None = None,
    precision: str = "bf16",
    skip_threshold: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs a plan on q, k, v `[B, H, S, D]` -> out `[B, H, S, D]`, lse `[B, H, S]` fp32, both in
    the order of the sequence.

    kv_len: int32 `[B]`, keys from there on are masked in that batch row (`Call.kv_len`). A plan
    with an order must then leave the padded tokens where they are: last, in their order.
    """
    if kv_len is not None and plan.order is not None:
        kv_len = kv_len + (plan.order.shape[-1] - q.shape[2])
    run = {"kv_len": kv_len, "precision": precision, "backend": backend}
    run["skip_threshold"] = skip_threshold
    if plan.order is None:
        return block_sparse_attention(q, k, v, plan.mask, **run)
    out, lse = block_sparse_attention(
        *(reorder(x, plan.order) for x in (q, k, v)), plan.mask, **run
    )
    back = inverse(plan.order, q.shape[2])
    return reorder(out, back), reorder(lse, back)
