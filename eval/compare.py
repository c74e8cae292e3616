"""All methods on one model at equal densities, beside random blocks, an oracle and the noise floor.

    python -m vdit_sparse.eval.compare run --frames 25 --out DIR     appends to DIR/rows.jsonl
    python -m vdit_sparse.eval.compare table --out DIR               prints Markdown

The tables of docs/methods.md are from docs/measured/methods.jsonl.

Every run starts from the noise of its prompt's seed and is compared with dense attention of the
same batch, on frames as they come from the decoder. A run that is in rows.jsonl is not repeated.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vdit_sparse.eval.calibrate import calibrate
from vdit_sparse.eval.calibrators.paro import PAROSearch
from vdit_sparse.eval.calibrators.sparse_vdit import SparseVDiTSearch
from vdit_sparse.eval.compare_table import tables
from vdit_sparse.eval.controls import OracleBlocks, RandomBlocks
from vdit_sparse.eval.denoise import latents, timed_call, use, warm_up
from vdit_sparse.eval.known_rows import KnownRows
from vdit_sparse.eval.metrics import QUICK_METRICS
from vdit_sparse.eval.probe import Probe
from vdit_sparse.kernels.block_sparse import PRECISIONS
from vdit_sparse.method import SparseAttention
from vdit_sparse.methods import (
    AdaSpaAttention,
    DraftAttention,
    PAROAttention,
    RadialAttention,
    RettentionAttention,
    SparseVDiTAttention,
)
from vdit_sparse.pipelines.attach import apply, summary
from vdit_sparse.pipelines.load import load_pipeline

PROMPTS = Path(__file__).parent / "prompts"
DENSITIES = (0.5, 0.35, 0.25, 0.15)
DENSE_STEPS = 4
EIGHT_BITS_AT = 0.25
COMMON = {"block": 64, "dense_steps": DENSE_STEPS}
PROBED = 4  # prompts of the run that measures errors and planning


@dataclass(frozen=True)
class Trial:
    """One row: `name` of the method or control, its settings, and which density it aims at;
    prepare: makes the file that the method needs, and is not called for a row that is known."""

    name: str
    method: SparseAttention
    target: float | None = None
    prepare: Callable[[], object] | None = None


def trials(pipe, inputs: dict, folder: Path, densities: tuple[float, ...]) -> Iterator[Trial]:
    """The methods near each density. Radial and Re-ttention have the densities that their geometry
    allows."""
    for fields in (
        {"d1": "half", "sink_frames": 0},
        {"d1": "half"},
        {},
        {"decay": 1.0},
    ):
        yield Trial("radial", RadialAttention(**COMMON, **fields))
    for density, refresh in ((0.35, 4), (0.1, 4), (0.1, 6), (0.1, "once")):
        method = RettentionAttention(**COMMON, density=density, refresh=refresh)
        yield Trial("rettention", method)
    for density in densities:
        fields = {**COMMON, "density": density}
        yield Trial("adaspa", AdaSpaAttention(**fields, refresh=(DENSE_STEPS, 9)), density)
        # Regions of 16 x 4 tokens tile the bundled model's frames of 16 x 28.
        yield Trial("draft", DraftAttention(**fields, pool=(16, 4)), density)
        for name, kind, search in _searches(density):
            file = folder / f"{name}-{inputs['num_frames']}-{density}.safetensors"
            prepare = partial(_calibrated, pipe, search, file, inputs)
            method = kind(calibration=str(file), dense_steps=DENSE_STEPS)
            yield Trial(name, method, density, prepare)
            if name == "paro" and density == EIGHT_BITS_AT:
                for precision in PRECISIONS[1:]:
                    yield Trial(name, replace(method, precision=precision), density, prepare)


def _calibrated(pipe, search, file: Path, inputs: dict) -> None:
    """Makes the file, if it is not there."""
    if not file.exists():
        calibrate(pipe, search, *_calibration_prompts(), out=file, **_sizes(inputs))


def _searches(density: float):
    yield "paro", PAROAttention, PAROSearch(block=64, density=density)
    # At 3,136 tokens the milliseconds of a mode are those of its launches: blocks cost here.
    search = SparseVDiTSearch(block=64, density=0.6 * density, target=density, cost="blocks")
    yield "sparse-vdit", SparseVDiTAttention, search


def controls(row: dict) -> Iterator[SparseAttention]:
    """Random blocks and the oracle at the density of a row; beside a mask that never changes also
    random blocks that never do."""
    density = round(row["sparse_density"], 2)
    yield RandomBlocks(**COMMON, density=density)
    yield OracleBlocks(**COMMON, density=density)
    if row["name"] == "radial":
        yield RandomBlocks(**COMMON, density=density, refresh="once")


def _calibration_prompts() -> tuple[list[str], list[int]]:
    return _lines(PROMPTS / "mini_calibration.txt"), [1000]


def _lines(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line]


def _sizes(inputs: dict) -> dict:
    return {name: value for name, value in inputs.items() if name not in ("prompt", "seed")}


class Comparison:
    """A loaded pipeline, the dense frames of all prompts, and the rows so far."""

    def __init__(self, pipe, inputs: dict, file: Path):
        self.pipe, self.inputs, self.known = pipe, inputs, KnownRows(file)
        warm_up(pipe, None, inputs)
        use(pipe, None)
        self.reference, clock = self._run()
        self._keep("dense", None, {"seconds": self._seconds(clock)})

    def add(self, trial: Trial) -> dict:
        """Measures a trial, or returns its row of an earlier time."""
        known = self._known(trial.name, trial.method)
        if known is not None:
            return known
        if trial.prepare is not None:
            trial.prepare()
        warm_up(self.pipe, trial.method, self.inputs)
        apply(self.pipe, trial.method)
        frames, clock = self._run()
        done = summary(self.pipe)
        sparse = [entry for entry in done.entries if not entry.dense and not entry.searched]
        row = {
            "target": trial.target,
            "density": done.density,
            "sparse_density": done.sparse_density,
            "step_density": sum(entry.density for entry in sparse) / max(len(sparse), 1),
            "backend": done.backend,
            "seconds": self._seconds(clock),
            **self._compare(frames),
            **self._probe(trial.method),
        }
        return self._keep(trial.name, trial.method, row)

    def add_noise_floor(self, backend: str) -> None:
        """Dense attention by another backend."""
        if self._known(f"dense {backend}", None):
            return
        use(self.pipe, None)
        self.pipe.transformer.set_attention_backend(backend)
        frames, clock = self._run()
        self.pipe.transformer.set_attention_backend("native")
        row = {"seconds": self._seconds(clock), **self._compare(frames)}
        self._keep(f"dense {backend}", None, row)

    def _run(self) -> tuple[Tensor, object]:
        return timed_call(self.pipe, self.inputs, lambda *_: None)

    def _seconds(self, clock) -> float:
        return clock.denoise_seconds / len(self.inputs["prompt"])

    def _compare(self, frames: Tensor) -> dict:
        device = self.pipe.device
        pairs = [(x.to(device), y.to(device)) for x, y in zip(frames, self.reference, strict=True)]
        return {name: [metric(*pair) for pair in pairs] for name, metric in QUICK_METRICS.items()}

    def _probe(self, method: SparseAttention) -> dict:
        """Error of the attention's output and time of planning, in a run of few prompts."""
        few = {**self.inputs}
        few["prompt"], few["seed"] = few["prompt"][:PROBED], few["seed"][:PROBED]
        probe = Probe.around(method)
        apply(self.pipe, probe, timed=True)
        latents(self.pipe, few)
        done = summary(self.pipe)
        return {"error": probe.mean_error(), "planning_share": done.planning_share}

    def _known(self, name: str, method: SparseAttention | None) -> dict | None:
        frames = self.inputs["num_frames"]
        return self.known.find(name=name, method=repr(method), frames=frames)

    def _keep(self, name: str, method: SparseAttention | None, measured: dict) -> dict:
        frames = self.inputs["num_frames"]
        row = {"name": name, "method": repr(method), "frames": frames, **measured}
        return self._known(name, method) or self.known.keep(row)


def compare(arguments: argparse.Namespace) -> None:
    """Runs whatever is not in the folder's rows yet."""
    pipe = load_pipeline(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    prompts = _lines(PROMPTS / "mini.txt")[: arguments.prompts]
    inputs = {
        **{name: value for name, value in pipe.generation.items() if name != "fps"},
        "num_frames": arguments.frames,
        "prompt": prompts,
        "seed": list(range(len(prompts))),
    }
    if arguments.steps:
        inputs["num_inference_steps"] = arguments.steps
    comparison = Comparison(pipe, inputs, arguments.out / "rows.jsonl")
    if pipe.device.type == "cuda":
        comparison.add_noise_floor("_native_flash")
    for trial in trials(pipe, inputs, arguments.out, tuple(arguments.densities)):
        if arguments.only and trial.name not in arguments.only:
            continue
        row = comparison.add(trial)
        _print_row(row)
        for control in controls(row):
            _print_row(comparison.add(Trial(type(control).__name__, control, row["target"])))


def _print_row(row: dict) -> None:
    psnr = sum(row["psnr"]) / len(row["psnr"])
    print(
        f"{row['name']:<14} {row['frames']:>3} frames  density {row['sparse_density']:.3f}  "
        f"PSNR {psnr:5.2f}  error {row['error']:.3f}  {row['seconds']:.2f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--out", type=Path, required=True, help="a folder; of table also a file")
    parser.add_argument("--frames", type=int, default=25)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--densities", type=float, nargs="*", default=DENSITIES)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--model")
    parser.add_argument("--only", nargs="*")
    arguments = parser.parse_args()
    if arguments.command == "table":
        file = arguments.out if arguments.out.is_file() else arguments.out / "rows.jsonl"
        lines = file.read_text().splitlines()
        print(tables([json.loads(line) for line in lines]))
        return
    with torch.inference_mode():
        compare(arguments)


if __name__ == "__main__":
    main()
