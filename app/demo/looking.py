"""What the worker does for Look inside: a run's video, and what its layers and heads visit."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from vdit_sparse.app.checks import read_image
from vdit_sparse.app.demo.ask import UPLOADS
from vdit_sparse.app.demo.runs import PICTURE, Pipelines, VideoWork, watching
from vdit_sparse.app.demo.store import Store
from vdit_sparse.app.demo.worker import Job
from vdit_sparse.app.generate import checked_settings
from vdit_sparse.app.inspect import spread
from vdit_sparse.app.loading import call_inputs
from vdit_sparse.app.options import InputError
from vdit_sparse.app.request import Request
from vdit_sparse.eval.files import new_file
from vdit_sparse.eval.inspect import TABLES, Inspection, Look, inspect, layers_of

# Bytes of the maps of one run.
MOST_BYTES = 256 * 2**20
MOST_STEPS, MOST_LAYERS = 8, 8
# What its video is called, or its image, before the suffix.
VIDEO = "video"
# Of the arguments of a call, what `inspect` is given by name.
OWN = ("prompt", "seed", "fps")


@dataclass(frozen=True)
class InspectWork:
    """Runs a request of one method twice: to its video, unless the user has that already, and once
    more to look. steps, layers: of how many to keep maps, spread over the run."""

    pipelines: Pipelines
    store: Store
    request: Request
    model: str | None
    steps: int
    layers: int

    def __call__(self, job: Job) -> dict:
        card = self._same_run(job) or self._video(job)
        with watching(self.pipelines, job) as load:
            found = self._inspect(job, load(self.request))
        folder = self.request.out
        card |= {
            "kind": job.kind,
            "video": _copied(card),
            "method": found.method.partition("(")[0],
            "grid": [found.grid.frames, found.grid.height, found.grid.width, found.grid.text],
            "layers": found.layers,
            "heads": found.heads,
            "steps": found.steps,
            "measured": list(found.measured),
            "densities": sorted(found.densities.items()),
            "tables": {name: _rounded(found.table(name)) for name in TABLES},
            "looks": [write_look(folder, look) for look in found.looks if look.maps],
        }
        self.store.keep(job.owner, job.name, card)
        return card

    def _same_run(self, job: Job) -> dict | None:
        """The card of a run that made the video of this request, with its files copied here."""
        for card in self.store.cards(job.owner):
            old = self.store.folder(job.owner, card["name"])
            same = card.get("command") == self.request.command and card["kind"] == "generate"
            if same and _same_uploads(old, self.request.out):
                self.request.out.mkdir(parents=True, exist_ok=True)
                shutil.copy(old / card["runs"][0]["file"], self.request.out / _copied(card))
                for name in (*card["files"], PICTURE):
                    shutil.copy(old / name, self.request.out / name)
                return card
        return None

    def _video(self, job: Job) -> dict:
        card = VideoWork(self.pipelines, self.store, self.request, self.model).make(job)
        out = self.request.out
        shutil.copy(out / card["runs"][0]["file"], out / _copied(card))
        return card

    def _inspect(self, job: Job, pipe) -> Inspection:
        settings = checked_settings(pipe, self.request)
        inputs = call_inputs(pipe, self.request, settings, read_image(self.request.image))
        count = settings["num_inference_steps"]
        kept = {name: value for name, value in inputs.items() if name not in OWN}
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            kept.pop(name, None)
        if self.request.negative_prompt:
            kept["negative_prompt"] = self.request.negative_prompt
        try:
            return inspect(
                pipe,
                self.request.runs[0].method,
                self.request.prompt,
                self.request.seed,
                steps=spread(range(count), self.steps),
                layers=spread(range(layers_of(pipe)), self.layers),
                most_bytes=MOST_BYTES,
                on_step=lambda done, total: job.progress("looking inside", done, total),
                **kept,
            )
        except ValueError as error:
            raise InputError(str(error)) from error


def _copied(card: dict) -> str:
    """What the video (or image) of a run's card is called beside the maps."""
    return VIDEO + Path(card["runs"][0]["file"]).suffix


def _same_uploads(old: Path, new: Path) -> bool:
    """Whether two runs had the same files; their command lines call all of them the same."""
    files = [[folder / name for folder in (old, new)] for name in UPLOADS.values()]
    contents = [[file.read_bytes() if file.is_file() else None for file in two] for two in files]
    return all(before == now for before, now in contents)


def write_look(folder: Path, look: Look) -> dict:
    """Writes the maps of a look to one file, and gives what is in it at which byte.

    Of each head: share, uint8 of the visited share of each pair of blocks; mass, fp16; keep, uint8
    in plan order; ordered, fp16, the mass in plan order, and order, int32, or null for both.
    """
    name, parts, at, heads = f"look-{look.step}-{look.layer}.bin", [], 0, []
    for head, found in sorted(look.maps.items()):
        plan = found.plan
        arrays = {
            "share": (plan.raster_share() * 255).round().byte().numpy(),
            "mass": found.mass.numpy(),
            "keep": plan.keep.byte().cpu().numpy(),
            "ordered": None if found.ordered is None else found.ordered.numpy(),
            "order": None if plan.order is None else plan.order.int().cpu().numpy(),
        }
        entry = {"head": head, "blocks": list(plan.blocks), "tokens": plan.tokens}
        for key, array in arrays.items():
            entry[key] = None if array is None else [at, *array.shape]
            if array is not None:
                content = np.ascontiguousarray(array).tobytes()
                # Browsers read numbers of four bytes at multiples of four.
                content += b"\0" * (-len(content) % 4)
                parts.append(content)
                at += len(content)
        heads.append(entry)
    with new_file(folder / name) as temporary:
        temporary.write_bytes(b"".join(parts))
    facts = {"step": look.step, "layer": look.layer, "why": look.why, "file": name}
    return {**facts, "heads": heads}


def _rounded(table: Tensor) -> list:
    """A table as lists, NaN as None."""
    return json.loads(json.dumps(np.round(table.tolist(), 4).tolist()).replace("NaN", "null"))


def parse_counts(form: dict) -> tuple[int, int]:
    """(steps, layers) to keep maps of, taken out of a form. Raises InputError."""
    found = []
    for name, most, default in (("maps_steps", MOST_STEPS, 3), ("maps_layers", MOST_LAYERS, 4)):
        value = form.pop(name, default)
        if type(value) is not int or not 1 <= value <= most:
            raise InputError(f"Maps can be kept of 1 to {most} steps and layers, got {value!r}.")
        found.append(value)
    return found[0], found[1]


def inspect_work(work: VideoWork, counts: tuple[int, int]) -> InspectWork:
    """The work of a request of one method. Raises InputError for another one."""
    runs = work.request.runs
    if len(runs) != 1 or runs[0].method is None:
        raise InputError("Choose one method to look into; dense attention visits everything.")
    return InspectWork(work.pipelines, work.store, work.request, work.model, *counts)
