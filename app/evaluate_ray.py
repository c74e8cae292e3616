"""`vdit-sparse eval run --ray`: samples handed out one by one to workers of a Ray cluster.

A worker that dies costs the sample in its hands, which another one makes again; its place is taken
by a new worker. All nodes must see the output folder.
"""

import importlib.util
from collections import Counter, deque

from vdit_sparse.app.evaluate_request import EvaluationRequest
from vdit_sparse.app.evaluate_worker import Worker
from vdit_sparse.app.generate import RunFailed
from vdit_sparse.app.options import InputError
from vdit_sparse.app.terminal import Progress

MOST_DEATHS = 3  # workers that one sample may cost


def evaluate_on_ray(request: EvaluationRequest, progress: Progress) -> tuple[int, int]:
    """(finished samples, failures). Joins the cluster that RAY_ADDRESS names or that runs on this
    machine, or else starts one here. Raises InputError without ray, RunFailed if a sample has cost
    three workers."""
    if importlib.util.find_spec("ray") is None:
        raise InputError("--ray needs the package ray: run `pip install 'vdit-sparse[cluster]'`.")
    import ray

    own = not ray.is_initialized()
    if own:
        ray.init(log_to_driver=False, logging_level="error")
    try:
        return _Pool(ray, request, progress).work()
    finally:
        if own:
            ray.shutdown()


class _Actor:
    """What runs on a node: a `Worker`, made by `start` so that its errors reach the caller."""

    def start(self, request: EvaluationRequest, name: str) -> list[int]:
        """How many methods each sample has."""
        self.worker = Worker(request, name)
        return [self.worker.finished(sample) for sample in request.samples]

    def do(self, number: int) -> tuple[int, int]:
        """(methods that the sample has now, failures of this worker so far)."""
        self.worker.evaluation.reload()
        self.worker.do(number)
        sample = self.worker.request.samples[number]
        return self.worker.finished(sample), self.worker.evaluation.failed


class _Pool:
    """The workers, what each has in hand, and the samples that nobody has taken yet."""

    def __init__(self, ray, request: EvaluationRequest, progress: Progress):
        self.ray, self.request, self.progress = ray, request, progress
        gpus = int(ray.cluster_resources().get("GPU", 0))
        nodes = sum(node["Alive"] for node in ray.nodes())
        self.count = min(request.ray or gpus or nodes, len(request.samples))
        self.kind = ray.remote(**({"num_gpus": 1} if gpus else {"num_cpus": 1}))(_Actor)
        self.left = deque(range(len(request.samples)))
        self.finished: list[int] = []
        self.started = 0
        self.failed: Counter = Counter()
        self.deaths: Counter = Counter()
        # call in flight -> (its worker, the worker's name, the sample; None: it is starting)
        self.busy: dict = {}

    def work(self) -> tuple[int, int]:
        self.progress("starting the first worker", 0, None)
        self._start()
        while self.busy:
            ready, _ = self.ray.wait(list(self.busy))
            self._take(ready[0])
        return sum(self.finished), self.failed.total()

    def _start(self) -> None:
        """A new worker, which loads its model. No two ever have the same name."""
        self.started += 1
        name, actor = f"ray-{self.started}", self.kind.remote()
        self.busy[actor.start.remote(self.request, name)] = (actor, name, None)

    def _take(self, done) -> None:
        """A finished call: the next sample for its worker, or a new worker for a dead one."""
        actor, name, number = self.busy.pop(done)
        try:
            result = self.ray.get(done)
        except self.ray.exceptions.RayActorError as error:
            self._bury(number, error)
            return
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from error
        if number is not None:
            self.finished[number], self.failed[name] = result
        elif not self.finished:
            # The first one has written the protocol, with the baseline that it found, for all.
            self.finished = result
            self.progress("starting the first worker", 1, 1)
            for _ in range(self.count - 1):
                self._start()
        total = len(self.request.samples) * len(self.request.trials)
        self.progress("samples", sum(self.finished), total)
        if self.left:
            number = self.left.popleft()
            self.busy[actor.do.remote(number)] = (actor, name, number)

    def _bury(self, number: int | None, error: Exception) -> None:
        self.deaths[number] += 1
        if self.deaths[number] >= MOST_DEATHS:
            at = "the start" if number is None else self.request.samples[number].prompt.text
            said = " ".join(str(error).split())[:300]
            raise RunFailed(
                f"{MOST_DEATHS} workers died at {at!r}, the last with: {said} Finished samples are "
                "kept."
            ) from error
        if number is not None:
            self.left.appendleft(number)
        if self.left:
            self._start()
