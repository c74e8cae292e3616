"""The report of a generate command: report.json, the labels of its pictures, and its table."""

import dataclasses
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from rich.table import Table

from vdit_sparse.app.options import RunChoice
from vdit_sparse.app.video import Panel, file_of, new_file
from vdit_sparse.eval.denoise import Clip

SCHEMA = 1
FILE = "report.json"


@dataclass(frozen=True, eq=False)
class Finished:
    """One finished run.

    name: unique among the runs; its video is `<name>.mp4`, its image `<name>.png`. speedup,
    metrics: against the first dense run; None and empty where there is none, and for that run
    itself. reference: whether it is that run. warmup_steps: untimed steps before it.
    """

    name: str
    choice: RunChoice
    clip: Clip
    warmup_steps: int = 0
    reference: bool = False
    speedup: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def file(self) -> str:
        return file_of(self.name, self.clip.frames)


@dataclass
class Report:
    """What a generate command did so far. docs/cli.md describes the file.

    facts: everything that holds for all runs: prompt, model, settings, environment.
    status: "running", "finished", "failed" or "interrupted"; error: why it failed.
    """

    facts: dict
    runs: list[Finished] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    status: str = "running"
    error: str | None = None

    def write(self, folder: Path) -> None:
        """Writes report.json, whole or not at all."""
        content = {
            "schema": SCHEMA,
            "status": self.status,
            "error": self.error,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            **self.facts,
            "runs": [run_facts(run) for run in self.runs],
            "files": [*self.files, FILE],
        }
        with new_file(folder / FILE) as temporary:
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def run_facts(run: Finished) -> dict:
    """One entry of the report's `runs`."""
    method, clip = run.choice.method, run.clip
    fields = {} if method is None else dataclasses.asdict(method)
    if fields.get("calibration") is not None:
        # Whoever is given a report needs no places on this machine; `command` says where it lay.
        fields["calibration"] = Path(fields["calibration"]).name
    return {
        "name": run.name,
        "file": run.file,
        "method": {
            "name": run.choice.name,
            "preset": run.choice.preset,
            "fields": fields,
        },
        "reference": run.reference,
        "density": clip.density,
        "sparse_density": clip.sparse_density,
        "largest_first_error": clip.error,
        "attention_calls": clip.attention_calls,
        "backend": clip.backend,
        "reasons": clip.reasons,
        "warmup_steps": run.warmup_steps,
        "denoise_seconds": clip.denoise_seconds,
        "decode_seconds": clip.decode_seconds,
        "speedup": run.speedup,
        "peak_memory_bytes": clip.peak_memory_bytes,
        **{name: run.metrics.get(name) for name in ("psnr", "ssim")},
    }


def files_of_former_report(folder: Path) -> list[Path]:
    """The files that an earlier command left in the folder, as its report lists them."""
    try:
        names = json.loads((folder / FILE).read_text())["files"]
        return [folder / name for name in names if Path(name).name == name]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def panel(run: Finished) -> Panel:
    """The run as the side-by-side and the contact sheet show it."""
    return Panel(run.clip.frames, run.choice.label, caption(run))


def caption(run: Finished) -> str:
    """Density, seconds, speed-up, PSNR and SSIM in one line."""
    seconds = run.clip.denoise_seconds
    parts = [f"density {run.clip.density:.3f}", f"{seconds:.{1 if seconds >= 10 else 2}f} s"]
    if run.speedup is not None:
        parts.append(f"speed {run.speedup:.2f}x")
    if run.metrics:
        parts += [f"PSNR {run.metrics['psnr']:.2f} dB", f"SSIM {run.metrics['ssim']:.4f}"]
    return " · ".join(parts)


def table(runs: list[Finished]) -> Table:
    """The runs as a table for the terminal."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("run")
    for name in ("density", "sparse step", "seconds", "speed-up", "PSNR dB", "SSIM"):
        shown.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        shown.add_row(
            run.name,
            _number(run.clip.density, ".3f"),
            _number(run.clip.sparse_density, ".3f"),
            _number(run.clip.denoise_seconds, ".2f"),
            "reference" if run.reference else _number(run.speedup, ".2f", "x"),
            _number(run.metrics.get("psnr"), ".2f"),
            _number(run.metrics.get("ssim"), ".4f"),
        )
    return shown


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else format(value, form) + unit
