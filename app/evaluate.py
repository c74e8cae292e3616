"""A suite of prompts through several methods: `vdit-sparse eval run`."""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from vdit_sparse.app.calibrate import parse_seeds, read_prompts
from vdit_sparse.app.checks import check_before_loading, read_image, smallest_size
from vdit_sparse.app.environment import commit
from vdit_sparse.app.evaluate_protocol import protocol_of
from vdit_sparse.app.generate import RunFailed, needs_full_warm_up
from vdit_sparse.app.loading import call_inputs, load, settings_of
from vdit_sparse.app.options import InputError, RunChoice, parse_compare
from vdit_sparse.app.request import Request, parse_request
from vdit_sparse.app.terminal import Progress
from vdit_sparse.app.video import write_image, write_video
from vdit_sparse.calibration import CalibratedAttention
from vdit_sparse.eval.baseline import Baseline, find_baseline, set_backend
from vdit_sparse.eval.denoise import execution_device, run, warm_up
from vdit_sparse.eval.measure import Chosen, Measure, choose
from vdit_sparse.eval.run import Evaluation, Sample, Stopped, Trial, samples_of, shard
from vdit_sparse.eval.store import PROTOCOL, Store, StoreError, read_protocol
from vdit_sparse.eval.suite import IMAGE, Prompt, Suite, SuiteError, read_suite

# Options of generate that this command has not.
NOT_ASKED = {"method": "dense", "set_": None, "preset": None, "compare": None, "seed": 0}
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


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """What the caller wants.

    trials: dense first, added where it was not asked for. metrics: None for all that can run.
    part: (index from 0, count) of the samples that this process makes. model: which model is
    loaded, how, and the settings of its call (its prompt is the suite's first). ray: None, or how
    many workers, 0 for as many as there are GPUs.
    """

    suite: Suite
    trials: tuple[Trial, ...]
    seeds: tuple[int, ...]
    out: Path
    model: Request
    metrics: tuple[str, ...] | None = None
    part: tuple[int, int] = (0, 1)
    ray: int | None = None
    keep_frames: bool = False

    @property
    def samples(self) -> Sequence[Sample]:
        """Those of this process, in their order."""
        return shard(samples_of(self.suite, self.seeds), *self.part)

    @property
    def worker(self) -> str:
        """The name of this process among those that write into the folder."""
        index, count = self.part
        return "main" if count == 1 else f"shard-{index + 1}-of-{count}"


def parse_evaluation(words: Mapping) -> EvaluationRequest:
    """The request of a command line, given as option -> text, number, list of texts or None.

    words["torchrun"]: RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them; without one of them it
    was not torchrun. Raises
    InputError for a word that means nothing and a suite that cannot be used.
    """
    suite = parse_suite(words["suite"], words["prompts"])
    trials = parse_trials(words["method"])
    model = {**words, **NOT_ASKED, "prompt": suite.prompts[0].text, "overwrite": True}
    model["image"] = _image(suite, words["image"])
    if suite.media == IMAGE:
        if words["num_frames"] not in (None, 1):
            raise InputError(f"The suite {suite.name} is of images: leave --num-frames out.")
        model["num_frames"] = 1
    part, local_rank = parse_part(words["shard"], words["torchrun"])
    if words["ray"] and part[1] > 1:
        raise InputError("--ray shares the samples out itself: leave --shard and torchrun out.")
    if local_rank is not None and model["device"] is None:
        model["device"] = _device_of(local_rank)
    chosen = [trial.choice for trial in trials]
    return EvaluationRequest(
        suite=suite,
        trials=tuple(trial.trial for trial in trials),
        seeds=parse_seeds(words["seeds"]),
        out=Path(words["out"]),
        model=replace(parse_request(model), runs=tuple(chosen)),
        metrics=tuple(words["metrics"].split(",")) if words["metrics"] else None,
        part=part,
        ray=words["ray_workers"] or 0 if words["ray"] else None,
        keep_frames=words["keep_frames"],
    )


def parse_suite(source: str, prompts: str | None) -> Suite:
    """The suite of that name or file; a `.txt` has a prompt a line."""
    try:
        if not source.endswith(".txt"):
            return read_suite(source, None if prompts is None else Path(prompts))
        texts = read_prompts(Path(source))
        return Suite(Path(source).stem, tuple(Prompt(text) for text in texts))
    except SuiteError as error:
        raise InputError(str(error)) from error


@dataclass(frozen=True)
class _Named:
    choice: RunChoice
    trial: Trial


def parse_trials(texts: Sequence[str]) -> list[_Named]:
    """Dense and the methods of `--method NAME:field=value,...`, each once."""
    named = []
    for text in ("dense", *(text for text in texts if text != "dense")):
        choice = parse_compare(text, "--method")
        trial = Trial(
            choice.name, choice.label, choice.method, choice.preset, _settings(choice.method)
        )
        known = (trial.name, trial.settings)
        if any((other.trial.name, other.trial.settings) == known for other in named):
            raise InputError(f"--method {text} is there twice, with the same settings.")
        named.append(_Named(choice, trial))
    return named


def _settings(method) -> dict:
    """All fields as plain data; of a calibration file the hash of its content, not its place."""
    if method is None:
        return {}
    fields = dataclasses.asdict(method)
    file = fields.get("calibration")
    if file is not None and Path(file).is_file():
        fields["calibration"] = f"sha256:{hashlib.sha256(Path(file).read_bytes()).hexdigest()}"
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()
    }


def parse_part(text: str | None, torchrun: Mapping) -> tuple[tuple[int, int], int | None]:
    """(index from 0, count) of "2/8" (the second of eight) times torchrun's processes, and the
    local rank, None without torchrun."""
    match = re.fullmatch(r"(\d+)/(\d+)", text or "1/1")
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"--shard must be such as 1/8 to 8/8, got {text!r}.")
    index, count = int(match[1]) - 1, int(match[2])
    if len(torchrun) < 3:
        return (index, count), None
    rank, world, local = (int(torchrun[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return (index * world + rank, count * world), local


def _device_of(local_rank: int) -> str | None:
    import torch

    return f"cuda:{local_rank}" if torch.cuda.is_available() else None


def _image(suite: Suite, given: str | None) -> str | None:
    """An image of the suite, by which it is seen that the model must take one."""
    images = [prompt.image for prompt in suite.prompts]
    if given is None and any(images) and not all(images):
        missing = suite.prompts[images.index(None)].text
        raise InputError(f"The prompt {missing!r} has no image, others have: give --image FILE.")
    return given or (str(images[0]) if images[0] else None)


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
    worker = Worker(request, request.worker, progress)
    for number in range(len(request.samples)):
        worker.do(number)
    return worker.finished(), worker.evaluation.failed


class Worker:
    """A loaded model and the folder that its samples go to."""

    def __init__(self, request: EvaluationRequest, name: str, progress: Callable = lambda *_: None):
        self.request, self.progress = request, progress
        check_before_loading(request.model)
        chosen = _choose(request)
        progress("loading the model", 0, None)
        self.pipe = load(request.model)
        self.settings = settings_of(self.pipe, request.model)
        self.store = Store(request.out, name)
        self.warm: dict[str, int] = {}
        self.known: tuple[Prompt, dict] | None = None
        progress("loading the model", 1, 1)
        agreed = self._protocol(chosen)
        self.evaluation = Evaluation(
            store=self.store,
            protocol=agreed,
            suite=request.suite,
            trials=request.trials,
            make=self._make,
            measure=Measure(chosen, execution_device(self.pipe)),
            write=self._write,
            keep_frames=request.keep_frames,
            facts={"commit": commit()},
            tell=self._tell,
        )
        self.total, self.rows = len(request.samples) * len(request.trials), self.finished()

    def do(self, number: int) -> None:
        """Makes what is missing of a sample of the request."""
        self.evaluation.do(self.request.samples[number])

    def finished(self) -> int:
        """Rows of the request's samples."""
        keys = (
            self.evaluation.key(sample, trial)
            for sample in self.request.samples
            for trial in self.request.trials
        )
        return sum(key in self.evaluation.rows for key in keys)

    def _protocol(self, chosen: Chosen) -> dict:
        baseline = self._baseline()
        return self.store.agree(
            protocol_of(self.pipe, self.request, self.settings, chosen, baseline)
        )

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
        backend = read_protocol(self.request.out)["baseline"]["backend"]
        set_backend(self.pipe, backend)
        return Baseline(backend, {}, {})

    def _make(self, prompt: Prompt, seed: int, trial: Trial) -> tuple[Tensor, dict]:
        inputs = {**self._inputs(prompt), "seed": seed}
        if trial.label not in self.warm:
            calibrated = isinstance(trial.method, CalibratedAttention)
            whole = calibrated or needs_full_warm_up(self.pipe, self.request.model)
            small = {} if whole else smallest_size(self.pipe)
            self.warm[trial.label] = warm_up(self.pipe, trial.method, {**inputs, **small})
        clip = run(self.pipe, trial.method, inputs, self._on_step)
        facts = {name: getattr(clip, name) for name in FACTS}
        return clip.frames, {**facts, "warmup_steps": self.warm[trial.label]}

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


def _choose(request: EvaluationRequest) -> Chosen:
    try:
        return choose(request.metrics, request.suite)
    except ValueError as error:
        raise InputError(f"--metrics: {error}") from error
