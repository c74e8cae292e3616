"""What the doors of the studio (its page, its addresses, its API) call: a user's jobs and runs."""

import io
import shutil
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from vdit_sparse.app.checks import check_before_loading
from vdit_sparse.app.demo import ask, bench, forms, looking, models
from vdit_sparse.app.demo.limits import Studio
from vdit_sparse.app.demo.runs import Pipelines, VideoWork
from vdit_sparse.app.demo.store import Store, new_name
from vdit_sparse.app.demo.worker import FINISHED, Job, Worker
from vdit_sparse.app.options import InputError
from vdit_sparse.calibration import load as load_calibration

EXAMPLES = (
    "a red balloon rises up over a green meadow at sunset",
    "a ufo moves in a circle over a neon grid",
    "a fox walks to the right in the forest",
    "a yellow fish swims to the left in the sea",
)
# Of a card, what the gallery shows.
BRIEF = ("name", "at", "kind", "prompt", "labels", "picture")


class Desk:
    """One studio: its settings, worker, pipelines and files."""

    def __init__(self, studio: Studio):
        self.studio = studio
        self.store = Store(studio.state, studio.limits.kept)
        self.worker = Worker(studio.limits, self._ended)
        self.pipelines = Pipelines()

    def forms(self) -> dict:
        """What the page has to know to draw its forms."""
        return {
            "methods": forms.methods(),
            "presets": forms.presets(),
            "models": models.offered(self.studio),
            "examples": EXAMPLES,
            "bench": bench.choices(self.studio),
            "compared": self.studio.limits.compared,
        }

    def about(self, model: str) -> dict:
        """What a model makes by default, and its presets. Raises InputError as `resolve`."""
        found = models.known(models.resolve(model, self.studio))
        unit = found.geometry
        return {
            "defaults": found.defaults,
            "geometry": unit and [unit.height, unit.width, unit.frames],
            "presets": list(found.presets),
            "takes_image": found.takes_image,
            "images": found.images,
            "refused": found.refused,
        }

    def submit(self, owner: str, kind: str, form: dict) -> Job:
        """Queues a run of a form. Raises InputError for a wrong one, or where the queue is full."""
        name = new_name()
        try:
            if kind == "bench":
                what, request = bench.parse(form, self.studio)
                title = f"{what} of {form['of']}"
                work = bench.BenchWork(self.store, what, form["of"], request)
            else:
                counts = looking.parse_counts(form) if kind == "inspect" else None
                title, work = self._video(owner, name, form)
                work = work if counts is None else looking.inspect_work(work, counts)
            return self.worker.submit(Job(owner, name, kind, title, work))
        except InputError:
            self.store.remove(owner, name)
            raise

    def _video(self, owner: str, name: str, form: dict) -> tuple[str, VideoWork]:
        out = self.store.folder(owner, name)
        request = ask.read(form, self.studio, out, self._kept(owner, out, form))
        check_before_loading(request)
        model = form.get("model") or models.BUNDLED_NAME
        named = None if model == models.BUNDLED_NAME else model
        return request.prompt, VideoWork(self.pipelines, self.store, request, named)

    def _kept(self, owner: str, out: Path, form: dict) -> dict[str, Path]:
        """The uploads of a user that a form names, by these names, in the folder of its run: what
        they upload later takes nothing away from a run that waits, and the run can be repeated."""
        found, kept = self.store.uploads(owner), {}
        for entry, name in ask.UPLOADS.items():
            source = found.get(str(form.get(entry)))
            if source is not None:
                out.mkdir(parents=True, exist_ok=True)
                kept[source.name] = Path(shutil.copy(source, out / name))
        return kept

    def _ended(self, job: Job, state: str) -> None:
        """What a job left behind that was cancelled or failed is of no use."""
        if state != FINISHED:
            self.store.remove(job.owner, job.name)

    def status(self, owner: str, name: str) -> dict | None:
        """A user's job as the page shows it, or None if they have none of that name."""
        job = self.worker.watch(name, owner)
        return None if job is None else self.shown(job)

    def shown(self, job: Job) -> dict:
        """A job as plain data; the result is in the gallery's card."""
        names = ["name", "kind", "title", "state", "doing", "done", "total", "preview", "error"]
        return {
            **{name: getattr(job, name) for name in names},
            "seconds_left": job.seconds_left(),
            "before": self.worker.place(job) if job.state == "waiting" else 0,
            "kept": job.state == FINISHED and self.store.card(job.owner, job.name) is not None,
        }

    def cancel(self, owner: str, name: str) -> bool:
        """Ends a user's job; whether there is one."""
        job = self.worker.watch(name, owner)
        if job is not None:
            self.worker.cancel(job)
        return job is not None

    def gallery(self, owner: str) -> list[dict]:
        """The finished runs of a user in short, newest first."""
        return [{name: card.get(name) for name in BRIEF} for card in self.store.cards(owner)]

    def upload_calibration(self, owner: str, file: Path) -> tuple[str, str]:
        """Keeps a calibration file of a user: the name that stands for it, and what it is for, in
        words. Raises InputError if it is none."""
        try:
            found = load_calibration(file)
        except (ValueError, OSError) as error:
            raise InputError(str(error).replace(str(file), "This file")) from error
        grid = found.grid
        said = f"{found.method}, {grid.frames} x {grid.height} x {grid.width} tokens, "
        said += f"{found.layers} layers, {found.steps} steps"
        return self.store.upload(owner, file.read_bytes()), said

    def upload_image(self, owner: str, file: Path) -> tuple[str, str]:
        """Keeps a first frame of a user as PNG: its name, and its size in words. Raises InputError
        if it is no image, or much larger than a frame may be."""
        image = read_image(file, 16 * self.studio.limits.pixels)
        content = io.BytesIO()
        image.save(content, format="PNG")
        return self.store.upload(
            owner, content.getvalue()
        ), f"{image.width} x {image.height} pixels"


def read_image(file: Path, most: int) -> Image.Image:
    """The picture in a file, upright, as RGB, of at most `most` pixels; raises InputError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=("PNG", "JPEG", "WEBP")) as image:
                if image.width * image.height > most:
                    raise InputError(
                        f"The image has {image.width:,} x {image.height:,} pixels: send one of at "
                        f"most {most:,}."
                    )
                return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombWarning) as error:
        raise InputError("This is no image that can be read: send a PNG, JPEG or WebP.") from error
