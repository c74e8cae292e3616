"""How much an error of a head at a step moves the final latents: weights for `vdit-sparse tune`."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vdit_sparse.call import Call
from vdit_sparse.eval.tune_samples import Samples
from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.block_mass import block_mass
from vdit_sparse.kernels.block_sparse import block_sparse_attention
from vdit_sparse.method import Plan, SparseAttention, real_keys
from vdit_sparse.tuned import heaviest

EFFECTS = ("head", "layer", "none")
ROUNDS = 20
OnRun = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Disturbed(SparseAttention):
    """Dense attention, but in some steps, layers and heads the blocks of largest mass alone.

    steps, layers, heads: which ones, None for all. share: kept share of blocks. errors: by (step,
    layer) fp64 `[H]`, |out - dense|^2 of the disturbed heads, summed.
    """

    steps: tuple[int, ...] | None = None
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    share: float = 0.2
    block: int = 64
    errors: dict = field(default_factory=dict, compare=False, repr=False)

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        """All blocks: what is left out depends on the dense output."""
        return Plan(BlockMask.full(q.shape[2], block=self.block, device=q.device))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Attention of q, k, v `[B, H, S, D]`, dense in the heads that are not disturbed."""
        call.note.density = 1.0
        if not (_among(call.step, self.steps) and _among(call.layer, self.layers)):
            return scaled_dot_product_attention(q, k, v, real_keys(call.kv_len, k))
        how = {"kv_len": call.kv_len, "backend": self.backend}
        out, lse = block_sparse_attention(q, k, v, self.plan(q, k, call).mask, **how)
        heads = list(range(q.shape[1]) if self.heads is None else self.heads)
        q, k, v, lse = (x[:, heads] for x in (q, k, v, lse))
        keep = heaviest(block_mass(q, k, lse, self.block), self.share, self.block, call.grid)
        less = block_sparse_attention(q, k, v, BlockMask.from_keep(keep, self.block), **how)[0]
        gap = (less.float() - out[:, heads].float()).square().sum((0, 2, 3), dtype=torch.float64)
        place = call.step, call.layer
        total = self.errors.setdefault(place, gap.new_zeros(out.shape[1]))
        total[heads] += gap
        out[:, heads] = less
        return out


def weights(
    samples: Samples, dense: Tensor, shape: tuple[int, int, int], by: str, on_run: OnRun
) -> tuple[Tensor, Tensor]:
    """What |error|^2 of a head's output at a step costs in |error|^2 of the final latents, taken as
    the product of a number for the step, fp64 `[steps]`, and one for the head, `[L, H]`.

    dense: the final latents of dense attention; shape: (steps, layers, heads). by: "head" disturbs
    each step alone, and each head of each layer alone in all steps, a run of all samples each;
    "layer" the heads of a layer together; "none" gives ones. Then the numbers are found by turns,
    so that each run's effect is the sum of its errors times their numbers.
    """
    steps, layers, heads = shape
    if by == "none":
        return _ones(shape[:1]), _ones(shape[1:])
    groups = [(layer, None) for layer in range(layers)]
    if by == "head":
        groups = [(layer, (head,)) for layer in range(layers) for head in range(heads)]
    trials = [Disturbed(steps=(step,)) for step in range(steps)]
    trials += [Disturbed(layers=(layer,), heads=own) for layer, own in groups]
    effects, errors = [], []
    for number, trial in enumerate(trials):
        moved = (samples.latents(trial) - dense).square().sum(dtype=torch.float64)
        effects.append(float(moved))
        errors.append(_table(trial, shape))
        on_run(number + 1, len(trials))
    effect, error = torch.tensor(effects, dtype=torch.float64), torch.stack(errors)
    return _solve(effect, error, steps)


def _table(trial: Disturbed, shape: tuple[int, int, int]) -> Tensor:
    table = torch.zeros(shape, dtype=torch.float64)
    for (step, layer), error in trial.errors.items():
        table[step, layer] = error.cpu()
    return table


def _solve(effect: Tensor, error: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The numbers of the steps and of the heads, from the effects `[runs]` and errors
    `[runs, steps, L, H]` of runs that disturb one step (the first `steps`), or one group of heads
    (the others)."""
    at, of = _ones((steps,)), _ones(error.shape[2:])
    groups = error[steps:].sum(1) > 0
    for _ in range(ROUNDS):
        predicted = torch.einsum("tlh,lh->t", error[:steps].sum(1), of)
        at = _ratio(effect[:steps], predicted)
        predicted = torch.einsum("rtlh,t->r", error[steps:], at)
        each = _ratio(effect[steps:], predicted)
        of = (groups * each[:, None, None]).sum(0)
    return at, of


def _ratio(effect: Tensor, predicted: Tensor) -> Tensor:
    """effect / predicted; what moved nothing gets the least of the others."""
    found = effect / predicted.clamp(min=1e-30)
    good = (predicted > 0) & (effect > 0)
    least = found[good].min() if good.any() else found.new_ones(())
    return torch.where(good, found, least)


def _ones(shape: tuple[int, ...]) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


def _among(number: int, wanted: tuple[int, ...] | None) -> bool:
    return wanted is None or number in wanted
