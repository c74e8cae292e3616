"""Who computes how much when, for a density, a PSNR or a speed-up: what `vdit-sparse tune` does.

1. `TuneSearch` measures what each head loses between dense steps, one sample after the other.
2. `tune_effect.weights` measures what an error of each step and head does to the final latents.
3. `tune_allocate.allocate` decides by these weights, by powers of them, with errors on one dense
   step more or less alike, and by `rounds` random changes to those of steps and layers. Each
   schedule is run, and that of least error of the latents is taken: how errors of many heads and
   steps add up, no sum tells.
4. For a PSNR or speed-up, bisection finds the density that reaches it.
"""

import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from vdit_sparse.calibration import Calibration, save
from vdit_sparse.eval.calibrate import calibrate, runs_of
from vdit_sparse.eval.tune_allocate import OutOfReach
from vdit_sparse.eval.tune_effect import EFFECTS, weights
from vdit_sparse.eval.tune_problem import Goal, Problem, Target, Tell, Weight
from vdit_sparse.eval.tune_record import TuneSearch
from vdit_sparse.eval.tune_samples import Samples, error_db
from vdit_sparse.method import check_choice
from vdit_sparse.tuned import TunedAttention

# The density at which weights are refined where the target is another thing, if it is in reach.
MIDDLE = 0.25
# How alike the errors of a head on one dense step may be, and powers of the measured numbers of
# steps and heads, that are tried first.
TOGETHER = (0.0, 0.3, 1.0)
POWERS = ((0.5, 1), (1, 0.5), (0.5, 0.5), (1.5, 1), (0, 0))
MOST_HEADS = 100


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
    **options,
) -> Tuned:
    """`tune_each` for one target and one file."""
    (found,) = tune_each(pipe, prompts, seeds, {out: target}, **options)
    return found


def tune_each(
    pipe,
    prompts: Sequence[str],
    seeds: Sequence[int],
    targets: Mapping[str | Path, Target],
    *,
    search: TuneSearch | None = None,
    effects: str | None = None,
    rounds: int = 32,
    batch: int = 1,
    tell: Tell = lambda *_: None,
    **settings,
) -> Iterator[Tuned]:
    """Finds a schedule for each target on every prompt with every seed; heads and effects are
    measured once. Yields each when it is written as a calibration of `TunedAttention`.

    targets: file -> target. effects: "head", "layer" or "none", see `weights`; None is "head" up to
    100 heads, else "layer". rounds: for each target. batch: samples that run at once, but for the
    measurements. settings: the other arguments of the pipeline's call. Stock attention is left
    behind, and for a speed-up the fastest dense backend. Raises OutOfReach, a ValueError, for such
    a target, and what `calibrate` raises.
    """
    from vdit_sparse.pipelines.attach import remove

    pairs = list(itertools.product(prompts, seeds))
    each = [prompt for prompt, _ in pairs], [seed for _, seed in pairs]
    samples = Samples(pipe, *each, settings, batch)
    search = search or TuneSearch()
    for target in targets.values():
        _check_density(target, search, settings["num_inference_steps"])
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "measured.safetensors"
            measured = _measure(pipe, search, prompts, seeds, file, settings, tell)
            problem = Problem(samples, measured, samples.latents(None))
            yield from _solve_all(problem, targets, effects, rounds, tell)
    finally:
        remove(pipe)


def _check_density(target: Target, search: TuneSearch, steps: int) -> None:
    """Raises OutOfReach, before anything is measured, for a density that no schedule has."""
    dense = -(-steps // (search.reach + 1))
    least = (dense + (steps - dense) * search.densities[0]) / steps
    if target.density is not None and target.density < least:
        raise OutOfReach(
            f"A run of {steps} steps has a density of at least {least:.3f}, for {dense} of them "
            f"are dense; got {target.density:g}: ask for more, or for more steps."
        )


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


def _solve_all(
    problem: Problem, targets: Mapping[str | Path, Target], effects, rounds: int, tell: Tell
) -> Iterator[Tuned]:
    """The schedule of each target, each written to its file as soon as it is found."""
    goals = {out: _goal(problem, target) for out, target in targets.items()}
    weight = _weigh(problem, effects, tell)
    for out, target in targets.items():
        found = _solve(problem, target, goals[out], weight, rounds, tell)
        asked = {"target": asdict(target), "effects": effects, "rounds": rounds}
        yield _saved(found, out, asked)


def _goal(problem: Problem, target: Target) -> Goal | None:
    """What is to be reached, None for a density. What is never reached is said here, before the
    weights are measured."""
    if target.density is not None:
        return None
    goal = Goal(problem, target)
    goal.best(Weight.ones(*problem.shape))
    return goal


def _weigh(problem: Problem, effects: str | None, tell: Tell) -> Weight:
    """What errors of steps and heads do, measured."""
    _steps, layers, heads = problem.shape
    by = effects or ("head" if layers * heads <= MOST_HEADS else "layer")
    check_choice("effects", by, EFFECTS)

    def on_run(done: int, total: int) -> None:
        tell("effects", done, total)

    return Weight(*weights(problem.samples, problem.dense, problem.shape, by, on_run))


def _solve(
    problem: Problem, target: Target, goal: Goal | None, weight: Weight, rounds: int, tell: Tell
) -> Tuned:
    density = target.density or max(MIDDLE, problem.floor + 0.1 * (1 - problem.floor))
    unweighted = problem.error(Weight.ones(*problem.shape), density)
    weight = _refine(problem, weight, density, rounds, tell)
    reached = None
    if goal is not None:
        density, reached = goal.reach(weight, tell)
    chosen = problem.choose(weight, density)
    latents = problem.samples.latents(TunedAttention(calibration=chosen.path))
    error = error_db(latents, problem.dense)
    return Tuned(chosen, problem.samples.density(), error, unweighted, reached)


def _refine(problem: Problem, weight: Weight, density: float, rounds: int, tell: Tell) -> Weight:
    """The weights of least error among `weight` with errors that are more or less alike, powers of
    the best of these, and random changes to the best so far, whose size grows after each that
    helped and shrinks after the others."""
    flat = all((x == 1).all() for x in (weight.step, weight.head))
    powers = () if flat else POWERS
    total, tried = len(TOGETHER) + len(powers) + rounds, []

    def attempt(one: Weight) -> bool:
        """Whether it is the best so far."""
        tried.append((problem.error(one, density), one))
        tell("refining", len(tried), total)
        return best() is one

    def best() -> Weight:
        return min(tried, key=lambda pair: pair[0])[1]

    for together in TOGETHER:
        attempt(replace(weight, together=together))
    alike = best()
    for power in powers:
        attempt(alike.power(*power))
    size, seeded = 0.5, torch.Generator().manual_seed(0)
    for _ in range(rounds):
        size *= 1.3 if attempt(best().changed(size, seeded)) else 0.93
    return best()
