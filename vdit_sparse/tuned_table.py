"""What a file of `vdit-sparse tune` says about the heads of a layer, and whether it can be used."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vdit_sparse.calibration import Calibration
from vdit_sparse.call import Call
from vdit_sparse.orders import AXES

# The level of a dense step after which none is sparse.
NOTHING = -1


@dataclass(frozen=True, eq=False)
class Table:
    """What a file says about the heads of one layer that a call has, as numbers on the CPU.

    steps: the searched ones; last: the place among them of a head's last dense step; level, share:
    see `TunedAttention`; all `[n][H]`. order: index in `AXES` of each head.
    """

    steps: list[int]
    last: list[list[int]]
    level: list[list[int]]
    share: list[list[float]]
    order: list[int]
    densities: Sequence[float]

    @classmethod
    def of(cls, found: Calibration, call: Call, heads: int) -> "Table":
        """The table of a call. Raises ValueError where tensors do not fit `heads` heads."""
        tensors = _tensors(found, call, heads)
        place = torch.arange(len(tensors["step"]))[:, None, None]
        dense = tensors.pop("dense").bool()
        tensors["last"] = torch.where(dense, place, -1).cummax(0).values
        steps = tensors.pop("step").tolist()
        own = {
            name: call.heads.own(x[..., call.layer, :], x.ndim - 2).tolist()
            for name, x in tensors.items()
        }
        return cls(steps, **own, densities=found.fields["densities"])

    def row(self, step: int) -> int:
        """The place of the searched step nearest to `step`, the earlier of two."""
        return min(range(len(self.steps)), key=lambda at: abs(self.steps[at] - step))


def _tensors(found: Calibration, call: Call, heads: int) -> dict[str, Tensor]:
    """What the file holds for this expert, if it is what it should be."""
    names = ("step", "dense", "level", "share", "order")
    tensors = {name: found.tensor(name, call.origin.expert) for name in names}
    densities = found.fields.get("densities")
    n = len(tensors["step"])
    per_step = (n, found.layers, heads)
    shapes = {"step": (n,), "order": (found.layers, heads)}
    for name, x in tensors.items():
        if x.shape != shapes.get(name, per_step) or not x.numel():
            raise ValueError(
                f"{found.path}: {name!r} must be {shapes.get(name, per_step)} for {heads} heads, "
                f"got {tuple(x.shape)}. Tune again."
            )
    wrong = [
        what
        for what, bad in (
            ("'densities' is missing", not densities),
            ("'step' does not rise", bool((tensors["step"].diff() <= 0).any())),
            ("the first step is not dense", not bool(tensors["dense"][0].all())),
            (
                "'level' is out of range",
                not _within(tensors["level"], NOTHING, len(densities or ())),
            ),
            ("'order' is out of range", not _within(tensors["order"], 0, len(AXES))),
            ("'share' is out of range", not _within(tensors["share"], 0, 1 + 1e-3)),
        )
        if bad
    ]
    if wrong:
        raise ValueError(f"{found.path} cannot be used: {'; '.join(wrong)}. Tune again.")
    return tensors


def _within(x: Tensor, low: float, end: float) -> bool:
    """Whether all entries are at least `low` and below `end`."""
    return bool((x >= low).all() and (x < end).all())
