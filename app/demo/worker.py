"""One thread that does the work of all users in turn, on the one device; jobs can be cancelled."""

import gc
import itertools
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from vdit_sparse.app.demo.limits import Limits
from vdit_sparse.app.generate import RunFailed
from vdit_sparse.app.options import InputError

log = logging.getLogger(__name__)

STATES = ("waiting", "running", "finished", "cancelled", "failed")
WAITING, RUNNING, FINISHED, CANCELLED, FAILED = STATES
# Ended jobs that can still be asked about.
REMEMBERED = 500


class Cancelled(KeyboardInterrupt):
    """Ends the work of a job whose user stopped it or went away; no code catches it as an error."""


class Busy(InputError):
    """The queue is full."""


@dataclass(eq=False)
class Job:
    """Work of one user, and how far it is.

    owner: key of the user; name: of the job, secret to them; kind: "generate", "inspect" or
    "bench". doing, done, total: what is going on and how much of it is done. preview: the latest
    picture of the run, as `preview.encoded` gives it; look: makes one. error: in words. result:
    what `work` gave. patience: seconds that a job goes on without being asked for; seen, began,
    stepped: seconds of the monotonic clock.
    """

    owner: str
    name: str
    kind: str
    title: str
    work: Callable[["Job"], dict] = field(repr=False)
    state: str = WAITING
    doing: str = "waiting"
    done: int = 0
    total: int | None = None
    preview: dict | None = None
    error: str | None = None
    result: dict | None = None
    patience: float = 120.0
    seen: float = field(default_factory=time.monotonic)
    began: float | None = None
    stepped: float | None = None
    look: Callable[[], dict | None] | None = field(default=None, repr=False)
    stopped: threading.Event = field(default_factory=threading.Event, repr=False)

    def progress(self, doing: str, done: int, total: int | None) -> None:
        """As `vdit_sparse.app.terminal.Progress`; raises Cancelled."""
        self.check()
        if doing != self.doing or done == 0:
            self.stepped = time.monotonic()
        self.doing, self.done, self.total = doing, done, total
        seen = self.look() if self.look else None
        # A run that starts has nothing of the one before it, or of its warm-up.
        self.preview = None if total and not done else seen or self.preview

    def check(self, *_) -> None:
        """Raises Cancelled if the job was cancelled, or nobody has asked for it for long."""
        if self.stopped.is_set():
            raise Cancelled("cancelled")
        if time.monotonic() - self.seen > self.patience:
            raise Cancelled("stopped, because the page was closed")

    def seconds_left(self) -> float | None:
        """Of what is going on, by the steps so far."""
        if self.state != RUNNING or not self.total or not self.done or self.stepped is None:
            return None
        return (time.monotonic() - self.stepped) / self.done * (self.total - self.done)


class Worker:
    """The queue and its thread. A job that nobody asks for is dropped when its turn comes; `ended`
    is told of each that is at its end."""

    def __init__(self, limits: Limits, ended: Callable[[Job, str], None]):
        self.limits, self.ended = limits, ended
        self.jobs: dict[str, Job] = {}
        self._queue: deque[Job] = deque()
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="studio worker", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Job:
        """Queues a job. Raises Busy if there are too many, of all users or of this one."""
        with self._change:
            own = sum(other.owner == job.owner for other in self._queue)
            if len(self._queue) >= self.limits.waiting:
                raise Busy(f"{len(self._queue)} runs are waiting already: try again in a while.")
            if own >= self.limits.each:
                raise Busy(f"{own} of your runs are waiting already: cancel one, or wait.")
            job.patience = self.limits.patience
            self.jobs[job.name] = job
            self._queue.append(job)
            self._forget()
            self._change.notify()
        return job

    def watch(self, name: str, owner: str) -> Job | None:
        """A user's job, which lives on by being asked for; None if they have none of that name."""
        job = self.jobs.get(name)
        if job is None or job.owner != owner:
            return None
        job.seen = time.monotonic()
        return job

    def current(self, owner: str) -> list[Job]:
        """The jobs of a user that are not at their end, oldest first."""
        return [
            job
            for job in self.jobs.values()
            if job.owner == owner and job.state in (WAITING, RUNNING)
        ]

    def place(self, job: Job) -> int:
        """How many jobs come before this one, the running one counted."""
        with self._change:
            before = itertools.takewhile(lambda other: other is not job, self._queue)
            running = any(other.state == RUNNING for other in self.jobs.values())
            return sum(1 for _ in before) + running

    def cancel(self, job: Job) -> None:
        """A waiting job ends at once, a running one at the next block of its transformer."""
        with self._change:
            job.stopped.set()
            if job in self._queue:
                self._queue.remove(job)
                job.state, job.doing = CANCELLED, "cancelled"
                self.ended(job, CANCELLED)

    def _forget(self) -> None:
        ended = [job for job in self.jobs.values() if job.state not in (WAITING, RUNNING)]
        for job in ended[:-REMEMBERED]:
            del self.jobs[job.name]

    def _run(self) -> None:
        while True:
            with self._change:
                while not self._queue:
                    self._change.wait()
                job = self._queue.popleft()
                job.state, job.began = RUNNING, time.monotonic()
            state = self._do(job)
            job.work, job.preview = _nothing, None
            self.ended(job, state)
            free_memory()
            # Last, so that whoever sees it finds everything cleared away.
            job.state = state

    def _do(self, job: Job) -> str:
        """Works, and gives the state in which the job ends."""
        try:
            job.check()
            job.result = job.work(job)
            return FINISHED
        except Cancelled as cancelled:
            job.doing = str(cancelled)
            return CANCELLED
        except Exception as error:
            # The worker outlives whatever a model does; the log has the traceback.
            log.warning("job %s failed", job.name[:8], exc_info=error)
            job.error = in_words(error)
            return FAILED


def in_words(error: Exception) -> str:
    """An error for the page: no options of the command line, no path, no traceback."""
    if isinstance(error, InputError):
        said = str(error)
    else:
        # What a run failed of; its own text names the server's folders.
        cause = error.__cause__ if isinstance(error, RunFailed) and error.__cause__ else error
        said = f"The run failed ({type(cause).__name__}: {str(cause)[:300]}). The log says more."
    said = re.sub(r"--([a-z][a-z-]*)", lambda option: option[1].replace("-", " "), said)
    said = re.sub(r"(?<![\w.])/(?:[^\s/:,;]+/)+", "", said)
    return said[:1].upper() + said[1:]


def _nothing(job: Job) -> dict:
    return {}


def free_memory() -> None:
    """Gives back what a run that ended has left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
