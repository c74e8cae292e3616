"""What a method is told about one attention call, and what it says back for the reports."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from vdit_sparse.grid import Grid


@dataclass(frozen=True)
class Origin:
    """Which model makes a call; empty where nobody knows. Calibrations are checked against it.

    model: hub id or folder; config: hash of the transformer's configuration; scheduler: its class.
    expert: which of the pipeline's denoisers this is.
    calibrations: folder of the calibration files that come with the checkpoint.
    """

    model: str = ""
    config: str = ""
    scheduler: str = ""
    expert: str = "transformer"
    calibrations: str = ""


@dataclass(frozen=True)
class Heads:
    """The heads of a layer that a call has: here all of them. Where they are spread over GPUs,
    `pipelines/ulysses.py` gives one that knows which."""

    def total(self, own: int) -> int:
        """How many heads the layer has, of which the call has `own`."""
        return own

    def own(self, x: Tensor, dim: int) -> Tensor:
        """The call's part of x, which has an entry for every head of the layer along `dim`."""
        return x

    def all(self, x: Tensor, dim: int) -> Tensor:
        """x, which has an entry for every head of the call along `dim`, with those of all heads."""
        return x


class Watch(Protocol):
    """Times device work without waiting for it."""

    def start(self, device: torch.device) -> object: ...

    def stop(self, started: object) -> object: ...


@dataclass(eq=False)
class Note:
    """What one call says about itself.

    density: kept share of key blocks that it computed, a number or a 0-dim tensor.
    searched: it passed over q and k once more to find a plan, so its time stands apart.
    calibration: the file that its plan came from.
    plans: marks of `watch`, one for each plan that was built; none where nobody times.
    """

    density: float | Tensor | None = None
    searched: bool = False
    calibration: str | None = None
    watch: Watch | None = None
    plans: list = field(default_factory=list)

    @contextmanager
    def planning(self, device: torch.device) -> Iterator[None]:
        """Times the building of a plan on `device`."""
        started = self.watch.start(device) if self.watch else None
        yield
        if self.watch:
            self.plans.append(self.watch.stop(started))


@dataclass(frozen=True)
class Call:
    """All that a method may know about one attention call.

    grid: the tokens of the sequence; video first, text last.
    layer, layers: 0-based index of this self-attention layer, and how many there are.
    step, steps: 0-based denoising step, and how many there are (None where the caller cannot know).
    memory: a dict of this layer, this guidance branch and this expert; emptied when the run ends.
    origin: which model calls.
    note: what the method writes down about this call.
    kv_len: int32 `[B]`, tokens of each batch row; those from there on, at the end of the text, are
        padding that nothing attends to. None where all are real.
    heads: which of the layer's heads q, k, v hold.
    """

    grid: Grid
    layer: int
    layers: int
    step: int
    steps: int | None
    memory: dict
    origin: Origin = Origin()
    note: Note = field(default_factory=Note)
    kv_len: Tensor | None = None
    heads: Heads = Heads()

    def step_at(self, when: int | float) -> int:
        """A step given as itself (int) or as a fraction of all steps (float in [0, 1), rounded
        down). Raises ValueError for a fraction of an unknown number of steps."""
        if isinstance(when, int):
            return when
        if self.steps is None:
            raise ValueError(
                f"{when} as a fraction of the denoising steps needs their number, which a bare "
                "transformer does not know: use vdit_sparse.apply on the pipeline, or whole steps."
            )
        return int(when * self.steps)
