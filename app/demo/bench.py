"""What the worker does for Bench: kernels or a forward, timed on the machine at hand."""

import json
from dataclasses import asdict, dataclass

from vdit_sparse.app import bench_kernels, bench_model
from vdit_sparse.app.bench_request import parse_kernels, parse_model
from vdit_sparse.app.bench_tables import facts_of, model_facts
from vdit_sparse.app.checks import check_device
from vdit_sparse.app.demo.limits import Studio
from vdit_sparse.app.demo.store import Store
from vdit_sparse.app.demo.worker import Job
from vdit_sparse.app.doctor import examine
from vdit_sparse.app.options import InputError
from vdit_sparse.eval.files import new_file
from vdit_sparse.kernels.bench.problem import SHAPES, Shape
from vdit_sparse.methods import METHODS
from vdit_sparse.pipelines.random_model import SIZES

# Self-attention of the bundled model, which a CPU can do.
MINI = {"mini": Shape(6, 64, 7, 16, 28)}
# On two CPU cores, a forward of one layer at this size takes a second.
ON_CPU = {"model": "wan2.1-1.3b", "size": "256x448", "frames": 9, "layers": 1, "rounds": 2}
ON_GPU = {"model": "wan2.1-1.3b", "size": "480x832", "frames": 81, "layers": 4, "rounds": 3}
DENSITIES = (0.1, 0.25, 0.5)
# What the doctor says of more than the server's own folders.
SECTIONS = ("machine", "sparse kernels", "dense backends")
FILE = "bench.json"


def choices(studio: Studio) -> dict:
    """What can be measured here."""
    on_gpu = check_device(studio.device).type == "cuda"
    return {
        "kernels": list(SHAPES) if on_gpu else list(MINI),
        "model": list(SIZES) if on_gpu else [ON_CPU["model"]],
        "density": list(DENSITIES),
        "methods": list(METHODS),
    }


def parse(form: dict, studio: Studio) -> tuple[str, object]:
    """What to measure, "kernels" or "model", and its request. Raises InputError for what this
    studio does not offer."""
    offer, what = choices(studio), form.get("what")
    if what not in ("kernels", "model") or form.get("of") not in offer[what]:
        raise InputError("Choose what to measure from the list.")
    density, methods = form.get("density"), form.get("methods")
    if density not in DENSITIES or not isinstance(methods, list) or set(methods) - set(METHODS):
        raise InputError(f"Choose a density of {DENSITIES} and methods of {', '.join(METHODS)}.")
    shared = {"device": studio.device, "dtype": None}
    if what == "kernels":
        own = {"shape": None, "kernel": None, "pattern": None, "density": [density], "block": 64}
        own |= {"seconds": None}
        request = parse_kernels({**shared, **own, "method": methods or ["none"]})
        shape = {**SHAPES, **MINI}[form["of"]]
        return what, bench_kernels.KernelBench(**{
            **vars(request), "shapes": {form["of"]: shape},
        })  # fmt: skip
    on_gpu = check_device(studio.device).type == "cuda"
    sizes = {**(ON_GPU if on_gpu else ON_CPU), "model": form["of"]}
    own = {"precision": None, "dense": None, "compile": False, "kernels": 0, "block": 64}
    request = parse_model({**shared, **own, **sizes, "method": methods, "density": density})
    return what, request


@dataclass(frozen=True)
class BenchWork:
    """Measures, and keeps the rows with what they were measured on."""

    store: Store
    what: str
    of: str
    request: object

    def __call__(self, job: Job) -> dict:
        def say(text: str) -> None:
            job.progress(text, 0, None)

        say("looking at the machine")
        checks = [asdict(check) for check in examine() if check.section in SECTIONS]
        if self.what == "kernels":
            measured = bench_kernels.measure(self.request, say, lambda row: None)
            rows = [row for rows in measured for row in rows]
            facts = facts_of(self.request.device, self.request.dtype)
        else:
            rows = bench_model.as_data(bench_model.measure(self.request, say))
            facts = model_facts(self.of, self.request)
        card = {
            "kind": job.kind,
            "prompt": f"{self.what} of {self.of}",
            "labels": [self.what, f"density {self._density()}"],
            "what": self.what,
            "rows": rows,
            "facts": facts,
            "checks": checks,
            "files": [FILE],
        }
        folder = self.store.folder(job.owner, job.name)
        folder.mkdir(parents=True, exist_ok=True)
        with new_file(folder / FILE) as temporary:
            temporary.write_text(json.dumps(card, indent=2, default=str) + "\n")
        card = json.loads((folder / FILE).read_text())
        self.store.keep(job.owner, job.name, card)
        return card

    def _density(self) -> float:
        return self.request.densities[0] if self.what == "kernels" else self.request.density
