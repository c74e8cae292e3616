"""One process of `vdit-sparse eval run`: a loaded model that makes samples into a folder."""

import os
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from vdit_sparse.app.checks import check_before_loading, read_image, smallest_size
from vdit_sparse.app.environment import commit
from vdit_sparse.app.evaluate_protocol import protocol_of
from vdit_sparse.app.evaluate_request import EvaluationRequest
from vdit_sparse.app.generate import needs_full_warm_up
from vdit_sparse.app.loading import call_inputs, load, settings_of
from vdit_sparse.app.options import InputError
from vdit_sparse.app.video import write_image, write_video
from vdit_sparse.calibration import CalibratedAttention
from vdit_sparse.eval.baseline import Baseline, find_baseline, set_backend
from vdit_sparse.eval.denoise import execution_device, makes_images, run, warm_up
from vdit_sparse.eval.measure import Chosen, Measure, choose
from vdit_sparse.eval.run import Evaluation, Sample, Trial
from vdit_sparse.eval.store import PROTOCOL, Made, Store, read_protocol
from vdit_sparse.eval.suite import IMAGE, Prompt

# What a row keeps of a `Clip`.
FACTS = (
    "density",
    "sparse_density",
    "attention_calls",
    "backend",
    "reasons",
    "denoise_seconds",
    "decode_seconds",
    "peak_memory_bytes",
)


class Worker:
    """A loaded model and the folder that its samples go to."""

    def __init__(self, request: EvaluationRequest, name: str, progress: Callable = lambda *_: None):
        self.request, self.progress = request, progress
        check_before_loading(request.model)
        chosen = _choose(request)
        progress("loading the model", 0, None)
        self.pipe = load(request.model)
        self.settings = _settings(self.pipe, request)
        self.warm: dict[str, int] = {}
        self.known: tuple[Prompt, dict] | None = None
        progress("loading the model", 1, 1)
        own = protocol_of(self.pipe, request, self.settings, chosen, self._baseline())
        self.store = Store(request.out, name)
        try:
            agreed = self._agree(own)
        except BaseException:
            self.store.close()
            raise
        self.evaluation = Evaluation(
            store=self.store,
            protocol=agreed,
            suite=request.suite,
            trials=request.trials,
            make=self._make,
            measure=Measure(chosen, execution_device(self.pipe)),
            write=self._write,
            keep_frames=request.keep_frames,
            facts={"commit": commit(), "host": platform.node(), "process": os.getpid()},
            tell=self._tell,
        )
        self.total = len(request.samples) * len(request.trials)
        self.rows = sum(self.finished(sample) for sample in request.samples)

    def close(self) -> None:
        """Lets another process write as this worker."""
        self.store.close()

    def do(self, number: int) -> None:
        """Makes what is missing of a sample of the request."""
        self.evaluation.do(self.request.samples[number])

    def finished(self, sample: Sample) -> int:
        """How many of the methods a sample has."""
        keys = (self.evaluation.key(sample, trial) for trial in self.request.trials)
        return sum(key in self.evaluation.rows for key in keys)

    def _agree(self, own: dict) -> dict:
        """The folder's protocol, with the baseline of the process that wrote it: of several that
        start at once each may find another one, where two backends are nearly as fast."""
        found = self.store.first(own)
        if self.request.model.dense_backend is None:
            set_backend(self.pipe, found["baseline"]["backend"])
            own = {**own, "baseline": found["baseline"]}
        return self.store.agree(own)

    def _baseline(self) -> Baseline:
        """What the command or the folder says, or else the fastest."""
        asked, file = self.request.model.dense_backend, self.request.out / PROTOCOL
        if asked is not None:
            return Baseline(asked, {}, {"others": f"--dense-backend {asked} was asked for"})
        if not file.exists():
            self.progress("looking for the fastest dense attention", 0, None)
            first = self._inputs(self.request.suite.prompts[0])
            found = find_baseline(self.pipe, {**first, "seed": 0})
            self.progress("looking for the fastest dense attention", 1, 1)
            return found
        return Baseline(read_protocol(self.request.out)["baseline"]["backend"], {}, {})

    def _make(self, prompt: Prompt, seed: int, trial: Trial) -> Made:
        inputs = {**self._inputs(prompt), "seed": seed}
        if trial.label not in self.warm:
            calibrated = isinstance(trial.method, CalibratedAttention)
            whole = calibrated or needs_full_warm_up(self.pipe, self.request.model)
            small = {} if whole else smallest_size(self.pipe)
            self.warm[trial.label] = warm_up(self.pipe, trial.method, {**inputs, **small})
        clip = run(self.pipe, trial.method, inputs, self._on_step)
        facts = {name: getattr(clip, name) for name in FACTS}
        return Made(clip.frames, {**facts, "warmup_steps": self.warm[trial.label]}, clip.latents)

    def _inputs(self, prompt: Prompt) -> dict:
        """The call's arguments for a prompt, whose text is encoded once for all methods and, while
        it is the last one, seeds."""
        if self.known is None or self.known[0] != prompt:
            asked = self.request.model
            negative = asked.negative_prompt if prompt.negative is None else prompt.negative
            request = replace(asked, prompt=prompt.text, negative_prompt=negative)
            image = read_image(prompt.image or asked.image)
            self.known = prompt, call_inputs(self.pipe, request, self.settings, image)
        return self.known[1]

    def _write(self, path: Path, frames: Tensor) -> None:
        if self.request.suite.media == IMAGE:
            write_image(path, frames[0])
        else:
            write_video(path, frames, self.settings["fps"])

    def _tell(self, sample: Sample, trial: Trial, what: str) -> None:
        self.rows += what == "row"
        self.progress("samples", self.rows, self.total)

    def _on_step(self, done: int, total: int) -> None:
        self.progress("this sample", done, total)


def _settings(pipe, request: EvaluationRequest) -> dict:
    """As `settings_of`. Raises InputError where a suite of videos meets a model of images."""
    settings = settings_of(pipe, request.model)
    if makes_images(pipe):
        if request.suite.media != IMAGE:
            raise InputError(
                f"{type(pipe).__name__} makes images, but the suite {request.suite.name} asks for "
                'videos: give --suite images, or a .toml with media = "image".'
            )
        settings.pop("num_frames", None)
    return settings


def _choose(request: EvaluationRequest) -> Chosen:
    try:
        return choose(request.metrics, request.suite)
    except ValueError as error:
        raise InputError(f"--metrics: {error}") from error
