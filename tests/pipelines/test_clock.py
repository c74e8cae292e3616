"""Steps, branches and runs of pipelines that say little about them."""

import torch
from diffusers.hooks.hooks import CacheContext

from vdit_sparse.grid import Grid
from vdit_sparse.pipelines.clock import Clock, Schedule

GRID = Grid(3, 4, 5)


def call(clock, timestep, context=None, grid=GRID, expert="transformer"):
    clock.check(grid)
    branch = clock.tick(expert, context, torch.tensor([timestep]))
    clock.done()
    return clock.run, clock.step, branch


def test_steps_are_changes_of_the_timestep_and_branches_are_calls():
    clock = Clock()
    seen = [call(clock, t) for t in (900.0, 900.0, 500.0, 500.0, 900.0)]
    assert seen == [
        (1, 0, "call 0"),
        (1, 0, "call 1"),
        (1, 1, "call 0"),
        (1, 1, "call 1"),
        (2, 0, "call 0"),
    ]


def test_guidance_branches_may_differ_in_text_but_not_in_size():
    clock = Clock()
    grids = [Grid(3, 4, 5, 7), Grid(3, 4, 5, 9), Grid(3, 4, 6, 9)]
    assert [call(clock, 900.0, grid=grid)[0] for grid in grids] == [1, 1, 2]


def test_steps_whose_rounded_timesteps_are_equal_are_told_apart_by_the_scheduler():
    timesteps = torch.tensor([1000.0, 999.0, 998.0, 500.0])
    index = iter([None, None, 1, 1, 2, 2, 3, 3])
    clock = Clock(lambda: Schedule(timesteps, next(index)))
    rounded = [float(t.bfloat16()) for t in timesteps for _ in range(2)]
    assert rounded[0] == rounded[2]
    seen = [call(clock, t) for t in rounded]
    assert [step for _, step, _ in seen] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {run for run, _, _ in seen} == {1} and clock.steps == 4
    assert [branch for _, _, branch in seen] == ["call 0", "call 1"] * 4


def test_a_scheduler_that_the_run_does_not_use_is_not_believed():
    left = Schedule(torch.tensor([900.0, 500.0, 100.0]), 3)
    clock = Clock(lambda: left)
    seen = [call(clock, t)[:2] for t in (900.0, 900.0, 500.0, 100.0, 900.0)]
    assert seen == [(1, 0), (1, 0), (1, 1), (1, 2), (2, 0)]


def test_a_new_schedule_is_a_new_run_even_at_the_same_timestep():
    schedules = [torch.tensor([900.0])] * 2 + [torch.tensor([900.0])] * 2
    given = iter(schedules)
    clock = Clock(lambda: Schedule(next(given)))
    assert [call(clock, 900.0)[0] for _ in schedules] == [1, 1, 2, 2]


def test_a_run_that_begins_late_has_fewer_steps():
    timesteps = torch.arange(10.0).flip(0)
    clock = Clock(lambda: Schedule(timesteps, None, 6))
    call(clock, 3.0)
    assert clock.steps == 4


def test_a_step_with_tiles_of_several_sizes_is_one_step():
    timesteps, tiles = torch.tensor([900.0, 500.0]), (Grid(4, 7, 14), Grid(4, 7, 15))
    index = iter([None, None, 1, 1])
    clock = Clock(lambda: Schedule(timesteps, next(index)))
    seen = [call(clock, t, grid=tile) for t in (900.0, 500.0) for tile in tiles]
    assert seen == [
        (1, 0, "call 0"),
        (1, 0, "call 1"),
        (1, 1, "call 0"),
        (1, 1, "call 1"),
    ]


def test_steps_are_the_pipelines_where_they_are_not_the_schedules():
    clock = Clock(lambda: Schedule(torch.arange(4.0), steps=7))
    call(clock, 3.0)
    assert clock.steps == 7


def test_a_guiders_calls_are_named_by_how_many_there_are():
    guidance = iter(["1", "2, prompt only", "2, prompt only", "3", "3", "3"])
    timesteps, index = torch.tensor([3.0, 2.0, 1.0]), iter([None, 1, 1, 2, 2, 2])

    def schedule():
        return Schedule(timesteps, next(index), guidance={"transformer": next(guidance)})

    clock = Clock(schedule)
    assert [call(clock, t)[1:] for t in (3.0, 2.0, 2.0, 1.0, 1.0, 1.0)] == [
        (0, "call 0"),
        (1, "call 0"),
        (1, "call 1 of 2, prompt only"),
        (2, "call 0"),
        (2, "call 1 of 3"),
        (2, "call 2 of 3"),
    ]


def test_a_named_branch_that_comes_twice_at_a_first_step_is_a_new_run():
    clock, context = Clock(), CacheContext("cond")
    assert [call(clock, 900.0, context)[0] for _ in range(2)] == [1, 2]


def test_a_step_of_the_context_wins_over_the_scheduler():
    schedule = Schedule(torch.tensor([900.0]), 0)
    clock = Clock(lambda: schedule)
    contexts = [CacheContext("cond", step_index=step) for step in (0, 1, 2, 0)]
    assert [call(clock, 900.0, c)[:2] for c in contexts] == [(1, 0), (1, 1), (1, 2), (2, 0)]
