"""What `vdit-sparse tune` works on: the target, and what schedules have of it on the samples."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from vdit_sparse.calibration import Calibration, save
from vdit_sparse.eval.baseline import find_baseline
from vdit_sparse.eval.tune_allocate import Losses, OutOfReach, allocate, lowest
from vdit_sparse.eval.tune_samples import Samples, error_db
from vdit_sparse.tuned import TunedAttention

HALVINGS = 7

# (what is done, how much of it is done, how much there is in all)
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Weight:
    """What errors cost.

    step, head: a number for each step, fp64 `[steps]`, and one for each head, `[L, H]`, whose
    product is the price of an error. together: how alike the errors on one dense step are, as in
    `allocate`.
    """

    step: Tensor
    head: Tensor
    together: float = 0.0

    @classmethod
    def ones(cls, steps: int, layers: int, heads: int) -> "Weight":
        """All errors cost the same."""
        both = ((steps,), (layers, heads))
        return cls(*(torch.ones(shape, dtype=torch.float64) for shape in both))

    def power(self, step: float, head: float) -> "Weight":
        """With powers of the numbers."""
        return replace(self, step=self.step.pow(step), head=self.head.pow(head))

    def changed(self, size: float, seeded: torch.Generator) -> "Weight":
        """With random factors for steps and layers, log-normal of this standard deviation, and
        another `together`."""

        def factors(*shape: int) -> Tensor:
            return (size * torch.randn(shape, generator=seeded, dtype=torch.float64)).exp()

        together = self.together + float(factors(1).log())
        return Weight(
            self.step * factors(len(self.step)),
            self.head * factors(len(self.head), 1),
            min(max(together, 0.0), 1.0),
        )


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is asked for, one of: `density`, the mean over all self-attention of a run; `psnr`, in
    dB against dense attention, mean over the samples; `speedup` of the denoising over the fastest
    dense attention of the machine. Raises ValueError for none or several, or out of range."""

    density: float | None = None
    psnr: float | None = None
    speedup: float | None = None

    def __post_init__(self):
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                f"Expected one of density, psnr and speedup as a target, got {given or 'none'}."
            )
        ((name, value),) = given.items()
        low, high = {"density": (0, 1), "psnr": (0, 100), "speedup": (1, 1000)}[name]
        if not low < value < high:
            raise ValueError(f"{name} must be above {low} and below {high}, got {value}.")


@dataclass(eq=False)
class Problem:
    """Measurements, and what comes of a choice by them on the samples.

    dense: the final latents of dense attention.
    """

    samples: Samples
    measured: Calibration
    dense: Tensor
    losses: dict[str, Losses] = field(init=False)

    def __post_init__(self):
        experts = sorted({name.split(".")[0] for name in self.measured.tensors})
        self.losses = {
            name: Losses.of(self._of(name, "sums"), self._of(name, "kept")) for name in experts
        }

    @property
    def shape(self) -> tuple[int, int, int]:
        """(steps, layers, heads)."""
        return self.measured.steps, *self._of(next(iter(self.losses)), "order").shape

    @property
    def floor(self) -> float:
        """The lowest density that the candidates can have."""
        return lowest([*self.losses.values()]) + 1e-6

    def choose(self, weight: Weight, density: float) -> Calibration:
        """The best schedule by these weights, written beside the measurements."""
        steps = {name: self._of(name, "step") for name in self.losses}
        parts = [
            (losses, weight.step[steps[name].long(), None, None] * weight.head)
            for name, losses in self.losses.items()
        ]
        tensors = {}
        for name, choice in zip(
            self.losses, allocate(parts, density, weight.together), strict=True
        ):
            found = {"step": steps[name], "order": self._of(name, "order")}
            found |= {"dense": choice.dense.byte(), "level": choice.level, "share": choice.share}
            tensors |= {f"{name}.{key}": x for key, x in found.items()}
        path = Path(self.measured.path).with_name("chosen.safetensors")
        chosen = replace(self.measured, path=str(path), tensors=tensors)
        save(chosen)
        return chosen

    def error(self, weight: Weight, density: float) -> float:
        """Error of the latents of a run of that schedule, in dB."""
        method = TunedAttention(calibration=self.choose(weight, density).path)
        return error_db(self.samples.latents(method), self.dense)

    def _of(self, expert: str, name: str) -> Tensor:
        return self.measured.tensor(name, expert)


@dataclass(eq=False)
class Goal:
    """A PSNR or speed-up, and what schedules have of it beside dense attention."""

    problem: Problem
    target: Target

    def __post_init__(self):
        samples = self.problem.samples
        if self.target.psnr is not None:
            self.wanted, self.dense = self.target.psnr, samples.frames(None)
        else:
            find_baseline(samples.pipe, samples.inputs())
            self.wanted, self.dense = self.target.speedup, samples.seconds(None)

    @property
    def ends(self) -> tuple[float, float]:
        """The density that has most of it, and the one that has least: PSNR rises with the density,
        speed falls with it."""
        ends = self.problem.floor, 1.0
        return ends[::-1] if self.target.psnr is not None else ends

    def value(self, weight: Weight, density: float) -> float:
        """What the schedule of that density has."""
        samples = self.problem.samples
        method = TunedAttention(calibration=self.problem.choose(weight, density).path)
        if self.target.speedup is not None:
            return self.dense / samples.seconds(method)
        values = samples.psnr(method, self.dense)
        return sum(values) / len(values)

    def best(self, weight: Weight) -> float:
        """The most there is. Raises OutOfReach if it is less than what is wanted."""
        found = self.value(weight, self.ends[0])
        if found < self.wanted:
            name = "PSNR" if self.target.psnr is not None else "speed-up"
            raise OutOfReach(
                f"The {name} at density {self.ends[0]:.3f} is {found:.2f}, expected "
                f"{self.wanted:g}: ask for less."
            )
        return found

    def reach(self, weight: Weight, tell: Tell) -> tuple[float, float]:
        """The lowest density that has the PSNR, or the highest that has the speed-up, and what it
        has, by bisection."""
        (good, bad), reached = self.ends, self.best(weight)
        for number in range(HALVINGS):
            middle = (good + bad) / 2
            found = self.value(weight, middle)
            if found >= self.wanted:
                good, reached = middle, found
            else:
                bad = middle
            tell("reaching the target", number + 1, HALVINGS)
        return good, reached
