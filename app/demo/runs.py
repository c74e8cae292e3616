"""What the worker does for Generate and Compare: the loaded pipeline, a run, its files and card."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import nn

from vdit_sparse import remove
from vdit_sparse.app import loading
from vdit_sparse.app.checks import check_after_loading
from vdit_sparse.app.demo.ask import UPLOADS
from vdit_sparse.app.demo.preview import Preview
from vdit_sparse.app.demo.script import script
from vdit_sparse.app.demo.store import Store
from vdit_sparse.app.demo.worker import Job, free_memory
from vdit_sparse.app.generate import generate
from vdit_sparse.app.report import FILE, Report, run_facts
from vdit_sparse.app.request import Request
from vdit_sparse.app.video import write_image
from vdit_sparse.eval.files import new_file
from vdit_sparse.eval.metrics import METRICS
from vdit_sparse.pipelines.families import DENOISERS

SCRIPT, COMMAND, PICTURE = "reproduce.py", "command.txt", "middle.png"


class Pipelines:
    """The pipeline that was used last, kept for the next request of the same model."""

    def __init__(self):
        self._key = self._pipe = self._preview = None

    def load(self, request: Request):
        """As `app.loading.load`. One model is in memory at a time."""
        key = request.model, request.dtype, request.device, request.image is not None
        if key != self._key:
            self._key = self._pipe = self._preview = None
            free_memory()
            self._pipe = loading.load(request)
            self._preview = Preview(self._pipe)
            self._key = key
        check_after_loading(self._pipe, request)
        return self._pipe

    @property
    def preview(self) -> Preview:
        """Of the loaded pipeline."""
        return self._preview

    def rest(self) -> None:
        """Takes the method, and all that it remembers, out of the pipeline."""
        if self._pipe is not None:
            remove(self._pipe)


@dataclass(frozen=True)
class VideoWork:
    """Makes the videos of a request into the folder of the job."""

    pipelines: Pipelines
    store: Store
    request: Request
    model: str | None

    def __call__(self, job: Job) -> dict:
        card = self.make(job)
        self.store.keep(job.owner, job.name, card)
        return card

    def make(self, job: Job) -> dict:
        """The videos and the other files, and the card that says what they are."""
        with watching(self.pipelines, job) as load:
            report = generate(self.request, job.progress, load)
        job.progress("measuring", 0, None)
        return self._card(job, report)

    def _card(self, job: Job, report: Report) -> dict:
        out, names = self.request.out, [finished.name for finished in report.runs]
        runs = [
            {**run_facts(run), "label": run.choice.label, "vmaf": vmaf}
            for run, vmaf in zip(report.runs, _vmaf(report), strict=True)
        ]
        frames = report.runs[-1].clip.frames
        write_image(out / PICTURE, frames[len(frames) // 2])
        settings = report.facts["settings"]
        # One frame is a picture, and only models of images have no number of frames.
        fps, images = settings["fps"] if len(frames) > 1 else None, "num_frames" not in settings
        text = script(self.request, names, self.model, fps, images=images)
        for file, content in ((SCRIPT, text), (COMMAND, self.request.command + "\n")):
            with new_file(out / file) as temporary:
                temporary.write_text(content)
        uploads = [name for name in UPLOADS.values() if (out / name).is_file()]
        card = {
            "kind": job.kind,
            "prompt": self.request.prompt,
            "labels": names,
            "model": self.model or "bundled",
            "settings": settings,
            "picture": PICTURE,
            "frames": len(frames),
            "height": frames.shape[-2],
            "width": frames.shape[-1],
            "fps": settings["fps"],
            "runs": runs,
            "files": [*report.files, FILE, SCRIPT, COMMAND, *uploads],
            "command": self.request.command,
            "script": text,
            "machine": report.facts["machine"],
            "versions": report.facts["versions"],
        }
        # Uploads by their plain names: where they lie is nobody's business.
        plain = json.dumps(card, default=str).replace(json.dumps(f"{out}/")[1:-1], "")
        return json.loads(plain)


@contextmanager
def watching(pipelines: Pipelines, job: Job) -> Iterator[Callable[[Request], object]]:
    """A loader whose pipeline shows the job a picture of each step, and ends a cancelled job at the
    next block of a transformer. In the end the pipeline is as it was, without a method."""
    with ExitStack() as undo:
        undo.callback(pipelines.rest)

        def load(request: Request):
            pipe = pipelines.load(request)
            undo.enter_context(pipelines.preview)
            job.look = pipelines.preview.picture
            undo.callback(setattr, job, "look", None)
            for block in _blocks(pipe):
                undo.callback(block.register_forward_pre_hook(job.check).remove)
            return pipe

        yield load


def _blocks(pipe) -> Iterator[nn.Module]:
    """The blocks of the pipeline's transformers."""
    for name in DENOISERS:
        model = getattr(pipe, name, None)
        for part in () if model is None else model.children():
            if isinstance(part, nn.ModuleList):
                yield from part


def _vmaf(report: Report) -> Iterator[float | None]:
    """VMAF of each run against the reference; None for that run, for images, of which it says
    nothing that its model of videos was made for, and where it cannot be had."""
    metric = METRICS["vmaf"]
    reference = next((run for run in report.runs if run.reference), None)
    usable = reference is not None and metric.unavailable() is None
    usable = usable and len(reference.clip.frames) > 1
    for run in report.runs:
        measured = usable and run is not reference
        yield metric(run.clip.frames, reference.clip.frames) if measured else None
