"""Who computes how much when, for a density, a PSNR or a speed-up: what `vdit-sparse tune` does.

1. `TuneSearch` measures what each head loses between dense steps, one sample after the other.
2. `tune_effect.weights` measures what an error of each step and head does to the final latents.
3. `tune_allocate.allocate` decides by these weights, by powers of them, and by `rounds` random
   changes to those of steps and layers. Each schedule is run, and that of least error of the
   latents is taken: how errors of many heads and steps add up, no sum tells.
4. For a PSNR or speed-up, bisection finds the density that reaches it.
"""

import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from vdit_sparse.calibration import Calibration, save
from vdit_sparse.eval.baseline import find_baseline
from vdit_sparse.eval.calibrate import calibrate, runs_of
from vdit_sparse.eval.tune_allocate import Losses, allocate, lowest
from vdit_sparse.eval.tune_effect import EFFECTS, weights
from vdit_sparse.eval.tune_record import TuneSearch
from vdit_sparse.eval.tune_samples import Samples, error_db
from vdit_sparse.method import check_choice
from vdit_sparse.tuned import TunedAttention

# The density at which weights are refined where the target is another thing, if it is in reach.
MIDDLE = 0.25
HALVINGS = 7
# Powers of the measured numbers of steps and heads that are tried first.
POWERS = ((1, 1), (0.5, 1), (1, 0.5), (0.5, 0.5), (1.5, 1), (0, 0))
MOST_HEADS = 100

# (what is done, how much of it is done, how much there is in all)
Tell = Callable[[str, int, int], None]
# A number for each step, fp64 [steps], and one for each head, [L, H]; their product is the weight.
Weight = tuple[Tensor, Tensor]


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


@dataclass(frozen=True, eq=False)
class Tuned:
    """What was found. density: of a run; error: of its latents in dB (`error_db`), mean over the
    samples; unweighted: that of the schedule with all weights 1; reached: the PSNR or speed-up,
    where that was the target."""

    calibration: Calibration
    density: float
    error: float
    unweighted: float
    reached: float | None = None


def tune(
    pipe,
    prompts: Sequence[str],
    seeds: Sequence[int],
    target: Target,
    *,
    out: str | Path,
    search: TuneSearch | None = None,
    effects: str | None = None,
    rounds: int = 32,
    batch: int = 1,
    tell: Tell = lambda *_: None,
    **settings,
) -> Tuned:
    """Finds a schedule on every prompt with every seed, and writes it as a calibration of
    `TunedAttention`.

    effects: "head", "layer" or "none", see `weights`; None is "head" up to 100 heads, else "layer".
    batch: samples that run at once, but for the measurements. settings: the other arguments of the
    pipeline's call. Stock attention is left behind, and for a speed-up the fastest dense backend.
    Raises ValueError for a target out of reach, and what `calibrate` raises.
    """
    from vdit_sparse.pipelines.attach import remove

    pairs = list(itertools.product(prompts, seeds))
    each = [prompt for prompt, _ in pairs], [seed for _, seed in pairs]
    samples = Samples(pipe, *each, settings, batch)
    search = search or TuneSearch()
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "measured.safetensors"
            measured = _measure(pipe, search, prompts, seeds, file, settings, tell)
            problem = Problem(samples, measured, samples.latents(None))
            found = _solve(problem, target, effects, rounds, tell)
    finally:
        remove(pipe)
    return _saved(found, out, {"target": asdict(target), "effects": effects, "rounds": rounds})


def _saved(found: Tuned, out: str | Path, asked: dict) -> Tuned:
    """Written to its place, with what was asked for among its fields."""
    made = found.calibration
    final = replace(made, path=str(out), fields={**made.fields, **asked})
    save(final)
    return replace(found, calibration=final)


def _measure(pipe, search, prompts, seeds, file: Path, settings: dict, tell: Tell) -> Calibration:
    """What `TuneRecorder` has seen, as a calibration file of no method."""
    runs = runs_of(search, prompts, seeds)

    def on_step(run: int, done: int, total: int) -> None:
        tell("measuring heads", run * total + done, runs * total)

    return calibrate(pipe, search, prompts, seeds, out=file, on_step=on_step, **settings)


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
        at, of = weight
        steps = {name: self._of(name, "step") for name in self.losses}
        parts = [
            (losses, at[steps[name].long(), None, None] * of)
            for name, losses in self.losses.items()
        ]
        tensors = {}
        for name, choice in zip(self.losses, allocate(parts, density), strict=True):
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


def _solve(problem: Problem, target: Target, effects, rounds: int, tell: Tell) -> Tuned:
    steps, layers, heads = problem.shape
    by = effects or ("head" if layers * heads <= MOST_HEADS else "layer")
    check_choice("effects", by, EFFECTS)

    def on_run(done: int, total: int) -> None:
        tell("effects", done, total)

    weight = weights(problem.samples, problem.dense, problem.shape, by, on_run)
    density = target.density or max(MIDDLE, problem.floor + 0.1 * (1 - problem.floor))
    ones = tuple(torch.ones_like(x) for x in weight)
    unweighted = problem.error(ones, density)
    weight = _refine(problem, weight, density, rounds, tell)
    reached = None
    if target.density is None:
        density, reached = _reach(problem, weight, target, tell)
    chosen = problem.choose(weight, density)
    latents = problem.samples.latents(TunedAttention(calibration=chosen.path))
    error = error_db(latents, problem.dense)
    return Tuned(chosen, problem.samples.density(), error, unweighted, reached)


def _refine(problem: Problem, weight: Weight, density: float, rounds: int, tell: Tell) -> Weight:
    """The weights of least error among powers of `weight` and random changes to the best so far,
    whose size grows after each that helped and shrinks after the others."""
    powers = POWERS if any((x != 1).any() for x in weight) else POWERS[:1]
    tried = [tuple(x.pow(p) for x, p in zip(weight, each, strict=True)) for each in powers]
    errors = []
    for number, each in enumerate(tried):
        errors.append(problem.error(each, density))
        tell("refining", number + 1, len(tried) + rounds)
    least = min(errors)
    best, size = tried[errors.index(least)], 0.5
    seeded = torch.Generator().manual_seed(0)
    for number in range(rounds):
        at, of = best
        at = at * (size * torch.randn(at.shape, generator=seeded, dtype=at.dtype)).exp()
        of = of * (size * torch.randn(len(of), 1, generator=seeded, dtype=of.dtype)).exp()
        error = problem.error((at, of), density)
        if error < least:
            best, least = (at, of), error
        size *= 1.3 if best[0] is at else 0.93
        tell("refining", len(tried) + number + 1, len(tried) + rounds)
    return best


def _reach(problem: Problem, weight: Weight, target: Target, tell: Tell) -> tuple[float, float]:
    """The density that reaches a PSNR (the lowest) or a speed-up (the highest), and what it has."""
    samples = problem.samples
    if target.psnr is not None:
        reference, wanted = samples.frames(None), target.psnr
    else:
        find_baseline(samples.pipe, samples.inputs())
        dense, wanted = samples.seconds(None), target.speedup

    def value(density: float) -> float:
        method = TunedAttention(calibration=problem.choose(weight, density).path)
        if target.speedup is not None:
            return dense / samples.seconds(method)
        values = samples.psnr(method, reference)
        return sum(values) / len(values)

    low, high = problem.floor, 1.0
    # PSNR rises with the density, speed falls with it.
    good = high if target.psnr is not None else low
    reached, others = value(good), (low, high)
    if reached < wanted:
        name = "PSNR" if target.psnr is not None else "speed-up"
        raise ValueError(
            f"The {name} at density {good:.3f} is {reached:.2f}, expected {wanted:g}: ask for less."
        )
    bad = others[1] if good == others[0] else others[0]
    for number in range(HALVINGS):
        middle = (good + bad) / 2
        found = value(middle)
        good, bad, reached = (middle, bad, found) if found >= wanted else (good, middle, reached)
        tell("reaching the target", number + 1, HALVINGS)
    return good, reached
