"""Videos (or images) of one prompt: same model, text and noise, several methods, and a report."""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

from vdit_sparse.app.checks import check_before_loading, read_image, smallest_size
from vdit_sparse.app.environment import commit, machine, versions
from vdit_sparse.app.loading import call_inputs, load, settings_of, takes_encoded_text
from vdit_sparse.app.options import InputError, RunChoice
from vdit_sparse.app.processes import processes
from vdit_sparse.app.report import Finished, Report, files_of_former_report, panel
from vdit_sparse.app.request import Request
from vdit_sparse.app.terminal import Progress
from vdit_sparse.app.video import contact_sheet, file_of, side_by_side, write_clip, write_image
from vdit_sparse.calibration import CalibratedAttention
from vdit_sparse.eval.denoise import execution_device, makes_images, run, warm_up
from vdit_sparse.eval.metrics import QUICK_METRICS


class RunFailed(Exception):
    """A run went wrong; what was finished before is in the output folder. Exit code 1."""


def generate(
    request: Request, progress: Progress, load: Callable[[Request], object] = load
) -> Report:
    """Makes the videos, or with a model of images the images, and writes them with their
    comparison and report into `request.out`.

    load: gives the request's pipeline, as `app.loading.load` does; the studio keeps its own.

    Each of them and the report are written as soon as a run is finished, so a later failure loses
    nothing; while none is, the folder keeps what it had. Raises InputError for what the caller can
    put right, and RunFailed for a run that went wrong; KeyboardInterrupt passes.
    """
    check_before_loading(request)
    image = read_image(request.image)
    progress("loading the model", 0, None)
    started = time.perf_counter()
    pipe = load(request)
    settings = checked_settings(pipe, request)
    inputs = call_inputs(pipe, request, settings, image)
    progress("loading the model", 1, 1)
    facts = _facts(pipe, request, settings)
    facts["load_seconds"] = time.perf_counter() - started
    session = _Session(pipe, request, inputs, settings["fps"], progress, Report(facts))
    session.run_all()
    return session.report


@dataclass(frozen=True)
class _Session:
    """A loaded pipeline on its way through the runs of a request."""

    pipe: object
    request: Request
    inputs: dict
    fps: float
    progress: Progress
    report: Report

    def run_all(self) -> None:
        report = self.report
        try:
            for name, choice in _named(self.request.runs):
                self._keep(self._run(name, choice))
            self._write_pictures()
            report.status = "finished"
        except KeyboardInterrupt:
            report.status = "interrupted"
            raise
        except Exception as error:
            report.status, report.error = "failed", f"{type(error).__name__}: {error}"
            kept = ", ".join(report.files) or "nothing"
            raise RunFailed(
                f"{report.error} (finished before: {kept}, in {self.request.out})"
            ) from error
        finally:
            if report.runs:
                report.write(self.request.out)

    def _run(self, name: str, choice: RunChoice) -> Finished:
        def on_step(done: int, total: int) -> None:
            self.progress(name, done, total)

        self.progress(f"{name}: warming up", 0, None)
        calibrated = isinstance(choice.method, CalibratedAttention)
        whole = calibrated or needs_full_warm_up(self.pipe, self.request)
        small = {} if whole else smallest_size(self.pipe)
        warmup_steps = warm_up(self.pipe, choice.method, {**self.inputs, **small})
        self.progress(f"{name}: warming up", 1, 1)
        on_step(0, self.inputs["num_inference_steps"])
        clip = run(self.pipe, choice.method, self.inputs, on_step, self.request.check)
        reference = next((other for other in self.report.runs if other.reference), None)
        if reference is None:
            return Finished(name, choice, clip, warmup_steps, reference=choice.method is None)
        return Finished(
            name,
            choice,
            clip,
            warmup_steps,
            speedup=reference.clip.denoise_seconds / clip.denoise_seconds,
            metrics={
                key: QUICK_METRICS[key](clip.frames, reference.clip.frames) for key in QUICK_METRICS
            },
        )

    def _keep(self, finished: Finished) -> None:
        out = self.request.out
        if not self.report.runs:
            for file in files_of_former_report(out):
                file.unlink(missing_ok=True)
        write_clip(out / finished.file, finished.clip.frames, self.fps)
        self.report.runs.append(finished)
        self.report.files.append(finished.file)
        self.report.write(out)

    def _write_pictures(self) -> None:
        out, report = self.request.out, self.report
        panels = [panel(finished) for finished in report.runs]
        heading = f"“{self.request.prompt}”  seed {self.request.seed}"
        write_image(out / "contact_sheet.png", contact_sheet(panels, heading))
        report.files.append("contact_sheet.png")
        if len(panels) > 1:
            beside = side_by_side(panels)
            report.files.append(file_of("side_by_side", beside))
            write_clip(out / report.files[-1], beside, self.fps)


def checked_settings(pipe, request: Request) -> dict:
    """As `settings_of`; a model of images has no number of frames. Raises InputError where it is
    asked for more than one, or an image comes without a size to fit it to."""
    settings = settings_of(pipe, request)
    if makes_images(pipe):
        if request.num_frames not in (None, 1):
            raise InputError(
                f"{type(pipe).__name__} makes images: leave --num-frames out, got "
                f"{request.num_frames}."
            )
        settings.pop("num_frames", None)
    if request.image is not None and not (settings.get("height") and settings.get("width")):
        raise InputError("This model has no size of its own to fit --image to: give --size HxW.")
    return settings


def needs_full_warm_up(pipe, request: Request) -> bool:
    """Whether kernels are made for the very size. Elsewhere a small video does: what a first call
    costs on a CPU, such as imports, which can be seconds, is the same for any size. (A calibrated
    method is warmed up at the size of its calibration, the only one that it runs at.)"""
    return request.compile or execution_device(pipe).type == "cuda"


def _named(runs: Iterable[RunChoice]) -> list[tuple[str, RunChoice]]:
    """The runs, dense ones first, each with a name of its own: radial, radial-2, ..."""
    named = {}
    for choice in sorted(runs, key=lambda choice: choice.method is not None):
        base = choice.preset or choice.name
        count = 1 + sum(name == base or name.startswith(f"{base} ") for name in named)
        named[base if count == 1 else f"{base} {count}"] = choice
    return [(name.replace(" ", "-"), choice) for name, choice in named.items()]


def _facts(pipe, request: Request, settings: dict) -> dict:
    options = asdict(request)
    kept = ("seed", "offload", "compile", "dense_backend", "check", "loras")
    return {
        "command": request.command,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "model": {
            "name": request.model or "bundled",
            "pipeline": type(pipe).__name__,
            "transformer": type(pipe.transformer or pipe.transformer_2).__name__,
            "dtype": str((pipe.transformer or pipe.transformer_2).dtype).removeprefix("torch."),
        },
        "settings": {
            **settings,
            **{name: options[name] for name in kept},
            "image": None if request.image is None else str(request.image),
            "text_encoded_once": takes_encoded_text(pipe),
            "warmup_at_full_size": needs_full_warm_up(pipe, request),
            "processes": processes(),
            "parallel": request.parallel if processes() > 1 else None,
        },
        "versions": versions(),
        "commit": commit(),
        "machine": machine(execution_device(pipe)),
    }
