"""A suite of prompts through several methods: `vdit-sparse eval run`."""

from collections.abc import Iterator
from contextlib import closing, contextmanager

from vdit_sparse.app.evaluate_request import EvaluationRequest
from vdit_sparse.app.evaluate_worker import Worker
from vdit_sparse.app.generate import RunFailed
from vdit_sparse.app.options import InputError
from vdit_sparse.app.terminal import Progress
from vdit_sparse.eval.run import Stopped
from vdit_sparse.eval.store import StoreError
from vdit_sparse.eval.suite import SuiteError


def evaluate(request: EvaluationRequest, progress: Progress) -> list[str]:
    """Makes what is missing in `request.out`, and returns lines that say what is there.

    Raises InputError for what the caller can put right, and RunFailed if samples failed.
    """
    if request.ray is not None:
        from vdit_sparse.app.evaluate_ray import evaluate_on_ray as work
    else:
        work = _evaluate_here
    with input_errors():
        finished, failed = work(request, progress)
    total = len(request.samples) * len(request.trials)
    said = f"{finished} of {total} samples are in {request.out}"
    if failed:
        raise RunFailed(
            f"{said}; {failed} failed, {request.out / 'failures'} says why. The same command tries "
            "them again."
        )
    return [said, f"next: vdit-sparse eval report {request.out}"]


@contextmanager
def input_errors() -> Iterator[None]:
    """Errors of suites and folders are the caller's; what stops an evaluation is a failed run."""
    try:
        yield
    except (StoreError, SuiteError) as error:
        raise InputError(str(error)) from error
    except Stopped as error:
        raise RunFailed(str(error)) from error


def _evaluate_here(request: EvaluationRequest, progress: Progress) -> tuple[int, int]:
    """(finished samples, failures)."""
    with closing(Worker(request, request.worker, progress)) as worker:
        for number in range(len(request.samples)):
            worker.do(number)
    return worker.rows, worker.evaluation.failed
