"""How far a method's output is from dense attention of the same q, k and v, call by call."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vdit_sparse.call import Call
from vdit_sparse.method import Plan, SparseAttention, real_keys


@dataclass(frozen=True, kw_only=True)
class Probe(SparseAttention):
    """Runs a method and also dense attention, whose output it only measures against.

    errors: |out - dense| / |dense| (L2 over all rows but padding) of each sparse call, 0-dim
        tensors.
    """

    method: SparseAttention
    errors: list[Tensor] = field(default_factory=list, compare=False, repr=False)

    @classmethod
    def around(cls, method: SparseAttention) -> "Probe":
        """A probe that is dense where `method` is."""
        names = "dense_steps last_dense_steps dense_layers last_dense_layers precision backend"
        return cls(method=method, **{name: getattr(method, name) for name in names.split()})

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        return self.method.plan(q, k, call)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        out = self.method.attend(q, k, v, call)
        real = real_keys(call.kv_len, k)
        dense = scaled_dot_product_attention(q, k, v, real).float()
        rows = 1 if real is None else real.mT
        self.errors.append(((out.float() - dense) * rows).norm() / (dense * rows).norm())
        return out

    def mean_error(self) -> float | None:
        """Mean over all sparse calls so far; None before the first."""
        return float(torch.stack(self.errors).mean()) if self.errors else None
