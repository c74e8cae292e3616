"""Where a denoising run is: its step, its guidance branch, and when a new run begins."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from diffusers.hooks.hooks import CacheContext
from torch import Tensor

from vdit_sparse.grid import Grid


class Schedule(NamedTuple):
    """What a scheduler knows of a run.

    timesteps: of the run, a new tensor for each run; index: place in it of the step in progress,
    None before the first step and where the scheduler does not count; first: the step that the run
    begins with, more than 0 where a pipeline skips some (image to image); steps: how many the run
    makes, None for as many as there are timesteps from the first on; guidance: what a modular
    pipeline's guider is doing in the step in progress, by expert.
    """

    timesteps: Tensor | None = None
    index: int | None = None
    first: int = 0
    steps: int | None = None
    guidance: Mapping[str, str] | None = None


@dataclass
class Clock:
    """Counts the denoising steps of one pipeline; shared by its experts, each of which sees only
    a part of them.

    Pipelines differ in what they say (diffusers passes the step for Wan T2V only), so the step is
    the context's, or else counted by changes of the scheduler's index, or else of the timestep
    (which several steps may share once it is rounded to bf16). The branch is the context's name, or
    else the number of the call within the step; where a guider leaves calls out of some steps, the
    second of two is not the second of three, while the first always has the prompt. A new run
    begins when the last one was reset or died, when the scheduler has another schedule (a pipeline
    sets it once a run, and only some models are reset), when steps go back, when the timestep
    rises, or when a branch comes twice at a first step.

    run: number of the run, 0 before the first; grid: of the last model call.
    """

    schedule_of: Callable[[], Schedule] = Schedule
    run: int = 0
    step: int = 0
    steps: int | None = None
    grid: Grid | None = None
    _in_call: bool = False
    _timestep: float | None = None
    _schedule: Schedule = Schedule()
    _index: int | None = None
    _indexed: bool = False
    _ended: bool = True
    _seen: set = field(default_factory=set)

    def end(self) -> None:
        """The run is over, or must be treated so: the next call begins a new one."""
        self._ended = True

    def check(self, grid: Grid) -> None:
        """Before a model call: another schedule, or a call that never came back, ends the run. So
        does another size of the video (guidance branches may differ in text) without a schedule;
        with one, a step may call the model for tiles of several sizes."""
        schedule, former = self.schedule_of(), self._schedule
        known = self.grid and replace(self.grid, text=grid.text)
        resized = schedule.timesteps is None and grid != known
        if self._in_call or resized or schedule.timesteps is not former.timesteps:
            self.end()
        self._schedule = schedule
        self.grid = grid

    def done(self) -> None:
        """After a model call."""
        self._in_call = False

    def tick(self, expert: str, context: CacheContext | None, timestep: Tensor) -> str:
        """Moves to the step of this model call and returns the branch."""
        if context is not None and context.step_index is not None:
            self._follow(context.step_index, (expert, context.name))
        else:
            self._count(timestep, (expert, context.name) if context else None)
        self._in_call = True
        known = context.num_inference_steps if context is not None else None
        self.steps = known or self._steps()
        branch = context.name if context is not None else self._number(expert)
        self._seen.add((expert, branch))
        return branch

    def _steps(self) -> int | None:
        timesteps, _, first, steps, _ = self._schedule
        return steps if steps or timesteps is None else len(timesteps) - first

    def _number(self, expert: str) -> str:
        number, all_calls = len(self._seen), (self._schedule.guidance or {}).get(expert)
        return f"call {number} of {all_calls}" if number and all_calls else f"call {number}"

    def _follow(self, step: int, call: tuple[str, str]) -> None:
        again = step == self.step and call in self._seen
        if self._ended or step < self.step or again:
            self._begin()
        if step != self.step:
            self._seen.clear()
        self.step = step

    def _count(self, timestep: Tensor, call: tuple[str, str] | None) -> None:
        index, self._index = self._index, self._schedule.index
        if self._index is not None and self._indexed and not self._ended:
            if index != self._index:
                self.step += 1
                self._seen.clear()
            return
        # One device sync a model call. Wan 2.2 TI2V gives every token its own timestep, 0 for those
        # of the input image: the largest is the step's.
        self._compare(float(timestep.max()), call)

    def _compare(self, timestep: float, call: tuple[str, str] | None) -> None:
        previous, self._timestep = self._timestep, timestep
        again = timestep == previous and self.step == 0 and call in self._seen
        if self._ended or previous is None or timestep > previous or again:
            self._begin()
        elif timestep != previous:
            self.step += 1
            self._seen.clear()

    def _begin(self) -> None:
        self.run += 1
        # A run that steps with another scheduler finds the index where an earlier run left it.
        self._indexed = self._schedule.index in (None, self._schedule.first)
        self.step = 0
        self._ended = False
        self._seen.clear()
