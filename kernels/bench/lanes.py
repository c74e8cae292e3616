"""Work in processes that are ended and replaced when a job fails or does not come back."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection, get_context
from time import monotonic

import torch


@dataclass
class Lane:
    """A process that works, and the job that it has until `end` (seconds of a clock)."""

    process: object
    pipe: connection.Connection
    job: object = None
    end: float = 0.0


def each(jobs: list | deque, work: Callable, lanes: int, seconds: float) -> Iterator[tuple]:
    """(job, result, None) or (job, None, what went wrong) of `work(job)`, as they come, from
    `lanes` processes; one whose job fails, or takes longer than `seconds`, is replaced: the errors
    of a GPU stay with a process. A deque may lose jobs meanwhile."""
    waiting = jobs if isinstance(jobs, deque) else deque(jobs)
    busy, idle = [], []
    while waiting or busy:
        while waiting and len(busy) < lanes:
            lane = idle.pop() if idle else start(work)
            lane.job, lane.end = waiting.popleft(), monotonic() + seconds
            lane.pipe.send(lane.job)
            busy.append(lane)
        limit = max(0.0, min(lane.end for lane in busy) - monotonic())
        ready = connection.wait([lane.pipe for lane in busy], timeout=limit)
        for lane in [lane for lane in busy if lane.pipe in ready or lane.end <= monotonic()]:
            result, fault = None, f"hung: no result in {seconds} s"
            if lane.pipe in ready:
                result, fault = answer(lane)
            busy.remove(lane)
            if fault is None:
                idle.append(lane)
            else:
                lane.process.kill()
            yield lane.job, result, fault
    for lane in idle:
        lane.process.kill()


def start(work: Callable) -> Lane:
    """A new process for `work`; torch is imported once for all."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "triton"])
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, work), daemon=True)
    process.start()
    theirs.close()
    return Lane(process, ours)


def serve(pipe: connection.Connection, work: Callable) -> None:
    """Does jobs until one fails."""
    fault = None
    while fault is None:
        result = None
        try:
            with torch.inference_mode():
                result = work(pipe.recv())
        except Exception as error:
            fault = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:90]}"
        pipe.send((result, fault))


def answer(lane: Lane) -> tuple[object, str | None]:
    """What a process says, or that it died."""
    try:
        return lane.pipe.recv()
    except EOFError:
        lane.process.join()
        return None, f"its process died: exit code {lane.process.exitcode}"
