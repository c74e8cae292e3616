"""A look at the first sparse call of each layer: a few of its rows beside exact attention."""

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vdit_sparse.call import Call
from vdit_sparse.method import SparseAttention

# Relative error of an output of zeros: a layer above it would do better without its attention.
BOUND = 1.0
ROWS = 8


class AttentionWarning(UserWarning):
    """A layer's sparse attention is not finite, or far from exact attention."""


@dataclass(eq=False)
class SpotCheck:
    """Compares random video rows of the first sparse call of each layer with exact attention;
    calls in which a method searches or caches by dense attention are passed over.

    The error of a layer is |out - exact| / |exact|, Frobenius norms over `rows` rows of all batch
    rows and heads. Above `bound`, or where it is not finite, a warning (`AttentionWarning`) or with
    `strict` a RuntimeError names the layer and the likely cause. Waits for the device once a layer.
    """

    strict: bool = False
    bound: float = BOUND
    rows: int = ROWS
    _seen: set[int] = field(default_factory=set)

    def forget(self) -> None:
        """A new run begins."""
        self._seen.clear()

    def look(
        self,
        path: str,
        qkv: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        call: Call,
        method: SparseAttention,
    ) -> float | None:
        """The error of a call of the layer `path`, or None if the layer was looked at before; q, k,
        v and out `[B, H, S, D]`, video first."""
        # Methods that ran dense say so by a number; a plan's density is a tensor.
        dense = isinstance(call.note.density, float) and call.note.density == 1.0
        if dense or call.layer in self._seen:
            return None
        self._seen.add(call.layer)
        seeded = torch.Generator().manual_seed(call.layer)
        rows = torch.randint(call.grid.video, (self.rows,), generator=seeded).to(out.device)
        exact = exact_rows(*qkv, rows, call.kv_len)
        error = float((out[:, :, rows].float() - exact).norm() / exact.norm())
        if not error <= self.bound:
            self._report(path, error, _cause(qkv, out, call, method))
        return error

    def _report(self, path: str, error: float, cause: str) -> None:
        text = (
            f"Sparse attention of {path} has a relative error of {error:.2f} over {self.rows} rows "
            f"(bound {self.bound:g}): {cause}"
        )
        if self.strict:
            raise RuntimeError(text)
        warnings.warn(text, AttentionWarning, stacklevel=2)


def exact_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, kv_len: Tensor | None) -> Tensor:
    """Attention of the queries at `rows` `[R]` to all real keys, fp32 `[B, H, R, D]`; one head at a
    time, so that no fp32 copy of all keys is held."""
    out = q.new_empty(*q.shape[:2], len(rows), q.shape[3], dtype=torch.float32)
    for b in range(q.shape[0]):
        end = q.shape[2] if kv_len is None else int(kv_len[b])
        for h in range(q.shape[1]):
            scores = q[b, h, rows].float() @ k[b, h, :end].float().T * q.shape[3] ** -0.5
            out[b, h] = scores.softmax(-1) @ v[b, h, :end].float()
    return out


def _cause(qkv: tuple, out: Tensor, call: Call, method: SparseAttention) -> str:
    for name, x in zip("qkv", qkv, strict=True):
        if not x.isfinite().all():
            return (
                f"its {name} is not finite already, so look before the attention (dtype, weights)."
            )
    density = call.note.density
    kept = "" if density is None else f" It keeps {float(density):.0%} of the blocks."
    if not out.isfinite().all():
        return (
            f"q, k and v are finite, so the kernel overflows (precision={method.precision!r}); try "
            'precision="bf16" or another backend.'
        )
    if method.precision != "bf16":
        return f'the 8-bit precision {method.precision!r} may not suit it; try "bf16".{kept}'
    if call.note.calibration:
        return f"the calibration {call.note.calibration} may not fit this model or prompt.{kept}"
    return f"the method drops what the layer needs; raise its density, or dense_layers.{kept}"
