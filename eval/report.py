"""What finished evaluations say: a line for each method, over the samples that all methods have."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from vdit_sparse.eval.confidence import interval
from vdit_sparse.eval.metrics import METRICS
from vdit_sparse.eval.store import StoreError, differences, digest, read_protocol, read_rows

# Column -> (heading, unit), before the metrics.
FIGURES = {
    "density": ("density", ""),
    "denoise_seconds": ("denoising", "s"),
    "speedup": ("speed-up", "x"),
    "peak_memory_bytes": ("peak memory", "GB"),
}
# The metrics of the first table and of the plots.
HEADLINE = ("psnr", "ssim", "lpips_alex", "lpips_vgg", "vmaf")
_SCALE = {"peak_memory_bytes": 1e-9}


@dataclass(frozen=True)
class Mean:
    """The mean over prompts; half of its 95 % confidence interval, None for a single prompt; and
    the number of prompts."""

    value: float
    half: float | None
    prompts: int


@dataclass(frozen=True)
class Line:
    """A method of the table: its samples' rows, and the means of its columns. `name` is that of the
    method without its settings."""

    name: str
    label: str
    rows: tuple[dict, ...]
    means: dict[str, Mean]
    adherence: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Findings:
    """All that a report shows.

    lines: dense first, then by method and falling density; columns: of `means`, in order; left_out:
    samples that not every method has; failures: attempts whose sample has no row to this day;
    homes: key -> the folder of its row; notes: what a reader must know.
    """

    protocol: dict
    lines: tuple[Line, ...]
    columns: tuple[str, ...]
    samples: int
    left_out: int
    failures: tuple[dict, ...]
    homes: dict[str, Path]
    notes: tuple[str, ...] = ()

    @property
    def main(self) -> tuple[str, ...]:
        """The columns of the first table."""
        return tuple(name for name in self.columns if name in (*FIGURES, *HEADLINE))

    @property
    def other(self) -> tuple[str, ...]:
        """The columns of the second one."""
        return tuple(name for name in self.columns if name not in self.main)

    @property
    def compared(self) -> tuple[str, ...]:
        """The metrics against dense among the columns."""
        metrics = [name for name in self.columns if name in METRICS]
        return tuple(name for name in metrics if "reference" in METRICS[name].takes)


def read_findings(folders: Sequence[Path]) -> Findings:
    """Findings of one or more folders of `vdit-sparse eval run`.

    Raises StoreError for folders of different protocols (naming what differs), for one that is none
    or broken, and where no sample was finished by all methods.
    """
    protocol = read_protocol(folders[0])
    rows: dict[str, dict] = {}
    homes: dict[str, Path] = {}
    failures: list[dict] = []
    for folder in folders:
        differing = differences(protocol, read_protocol(folder))
        if differing:
            raise StoreError(
                f"{folders[0]} and {folder} have different protocols ({'; '.join(differing)}): "
                "their samples do not compare; make a report of each."
            )
        for row in read_rows(folder):
            if row["protocol"] != digest(protocol):
                raise StoreError(
                    f"{folder} has rows of another protocol ({row['protocol']}): it was changed "
                    "by hand; make it again."
                )
            rows.setdefault(row["key"], row)
            homes.setdefault(row["key"], folder)
        failures += read_rows(folder, "failures")
    groups, samples, left_out = _common(list(rows.values()))
    lines = sorted((_line(group) for group in groups), key=_order)
    shown = {name for line in lines for name in line.means}
    return Findings(
        protocol=protocol,
        lines=tuple(lines),
        columns=tuple(name for name in (*FIGURES, *METRICS) if name in shown),
        samples=samples,
        left_out=left_out,
        failures=tuple(row for row in failures if row["key"] not in rows),
        homes=homes,
        notes=tuple(_notes(lines, left_out)),
    )


def heading(column: str) -> str:
    """A column's title with its unit."""
    if column in FIGURES:
        title, unit = FIGURES[column]
    else:
        title, unit = METRICS[column].title, METRICS[column].unit
    return f"{title} ({unit})" if unit else title


def show(mean: Mean | None) -> str:
    """ "27.31 ± 0.42": two digits of the interval, but at most four of the value, and no interval
    that rounds to nothing."""
    if mean is None:
        return "–"
    size = math.floor(math.log10(abs(mean.value))) if mean.value else 0
    digits = 3 - size
    if mean.half:
        digits = min(digits, 1 - math.floor(math.log10(mean.half)))
    digits = max(0, digits)
    shown = f"{mean.value:.{digits}f}"
    half = f"{mean.half or 0:.{digits}f}"
    return f"{shown} ± {half}" if float(half) else shown


def mean_over_prompts(values: Sequence[tuple[str, float]]) -> Mean:
    """The mean of (prompt, value) pairs over prompts, several seeds of a prompt counting as their
    mean, and Student's confidence interval: prompts are drawn, seeds of one prompt are alike."""
    by_prompt = defaultdict(list)
    for prompt, value in values:
        by_prompt[prompt].append(value)
    means = [fmean(each) for each in by_prompt.values()]
    half = interval(means)[1] if len(means) > 1 else None
    return Mean(fmean(means), half, len(means))


def _common(rows: list[dict]) -> tuple[list[list[dict]], int, int]:
    """Rows by method of the samples that every method has, their number, and that of the others."""
    by_method: dict[tuple, dict] = defaultdict(dict)
    for row in rows:
        method = row["method"]
        sample = (row["prompt"], row["negative_prompt"], row["seed"])
        by_method[method["name"], str(method["settings"])][sample] = row
    if not by_method:
        raise StoreError("There is no finished sample yet.")
    everywhere = set.intersection(*(set(group) for group in by_method.values()))
    if not everywhere:
        raise StoreError(
            "There is no sample that all methods have: finish `vdit-sparse eval run` first."
        )
    anywhere = set.union(*(set(group) for group in by_method.values()))
    groups = [
        [row for sample, row in group.items() if sample in everywhere]
        for group in by_method.values()
    ]
    return groups, len(everywhere), len(anywhere - everywhere)


def _line(rows: list[dict]) -> Line:
    columns = defaultdict(list)
    adherence: dict[str, tuple[int, int]] = {}
    for row in rows:
        figures = {name: row.get(name) for name in FIGURES} | row.get("metrics", {})
        for name, value in figures.items():
            if value is not None:
                columns[name].append((row["prompt"], value * _SCALE.get(name, 1)))
        for name, (right, asked) in row.get("adherence", {}).items():
            before = adherence.get(name, (0, 0))
            adherence[name] = (before[0] + right, before[1] + asked)
    return Line(
        name=rows[0]["method"]["name"],
        label=rows[0]["method"]["label"],
        rows=tuple(rows),
        means={name: mean_over_prompts(values) for name, values in columns.items()},
        adherence=adherence,
    )


def _order(line: Line) -> tuple:
    return line.name != "dense", line.name, -line.means["density"].value


def _notes(lines: Sequence[Line], left_out: int) -> list[str]:
    notes = []
    if left_out:
        notes.append(f"{left_out} samples that not every method has are left out.")
    unmeasured = Counter(
        f"{METRICS[name].title}: {why}"
        for line in lines
        for row in line.rows
        for name, why in row.get("unmeasured", {}).items()
        if name in METRICS
    )
    notes += [f"{why} ({count} samples have no value)" for why, count in unmeasured.items()]
    dense = {(row["prompt"], row["seed"]): row["frames_sha256"] for row in lines[0].rows}
    other = sum(
        row["reference_sha256"] != dense[row["prompt"], row["seed"]]
        for line in lines[1:]
        for row in line.rows
        if lines[0].name == "dense"
    )
    if other:
        notes.append(
            f"The dense run of {other} samples was repeated for its frames and came out with "
            "other bits than the first time: dense attention is not deterministic here."
        )
    commits = sorted({str(row.get("commit")) for line in lines for row in line.rows})
    if len(commits) > 1:
        notes.append(f"The rows are from several commits: {', '.join(commits)}.")
    return notes
