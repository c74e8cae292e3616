"""`vdit-sparse eval vbench`: VBench's dimensions of a folder of videos, and its environment."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vdit_sparse.app.generate import RunFailed
from vdit_sparse.app.options import InputError, hint
from vdit_sparse.app.terminal import Progress
from vdit_sparse.eval.files import new_file
from vdit_sparse.eval.suite import read_vbench
from vdit_sparse.eval.vbench import (
    DIMENSIONS,
    LONG_SECONDS,
    NATIVE,
    STANDARD_ONLY,
    DimensionFailed,
    Videos,
    by_package,
    flickering,
    normalised,
    seconds,
    totals,
    videos_of,
)

FILE = "vbench.json"
PACKAGES = ("vbench==0.1.5", "torch", "torchvision", "setuptools<81")
PYTHONS = ((3, 9), (3, 11))
DETECTRON = "git+https://github.com/facebookresearch/detectron2.git"
NEEDS_DETECTRON = ("object_class", "multiple_objects", "color", "spatial_relationship")


@dataclass
class VBenchRun:
    """What is asked for, and the scores so far.

    python: of VBench's environment, None where there is none; info, entries: VBench's list of
    prompts, None for videos of other prompts. videos: of each dimension that was looked at.
    """

    folder: Path
    out: Path
    dimensions: tuple[str, ...]
    python: Path | None = None
    info: Path | None = None
    entries: list | None = None
    device: str | None = None
    scores: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    videos: dict[str, Videos] = field(default_factory=dict)


def parse_vbench(words: Mapping) -> VBenchRun:
    """The run of a command line. Raises InputError for words that mean nothing."""
    if words["videos"] is None:
        raise InputError("--videos DIR is missing: the folder of one method's videos.")
    folder = Path(words["videos"])
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}: give one method's, DIR/videos/METHOD.")
    info = Path(words["prompts"]) if words["prompts"] else None
    python = _python(words["python"])
    if words["dimensions"]:
        dimensions = tuple(words["dimensions"].split(","))
    elif python is None:
        dimensions = NATIVE
    else:
        dimensions = tuple(x for x in DIMENSIONS if info is not None or x not in STANDARD_ONLY)
    for name in dimensions:
        if name not in DIMENSIONS:
            known = ", ".join(DIMENSIONS)
            raise InputError(f"There is no dimension {name!r}{hint(name, DIMENSIONS)}: {known}.")
    try:
        entries = None if info is None else read_vbench(info)
    except ValueError as error:
        raise InputError(str(error)) from error
    out = Path(words["out"]) if words["out"] else folder.with_name(f"{folder.name}-vbench")
    return VBenchRun(folder, out, dimensions, python, info, entries, words["device"])


def _python(word: str | None) -> Path | None:
    """A Python by its path or name; its link is kept, for by that it knows its environment."""
    if word is None:
        return None
    found = shutil.which(word)
    if found is None:
        raise InputError(f"There is no program --python {word}.")
    return Path(found).absolute()


def evaluate_vbench(run: VBenchRun, progress: Progress) -> list[str]:
    """Scores each dimension, writes vbench.json after each, and returns the lines of a table.

    Raises RunFailed, after all dimensions, where one has no score.
    """
    try:
        run.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"Cannot write to --out {run.out} ({error.strerror}).") from error
    for number, dimension in enumerate(run.dimensions):
        progress("dimensions", number, len(run.dimensions))
        try:
            run.videos[dimension] = videos_of(run.folder, dimension, run.entries)
            run.scores[dimension] = _score(run, dimension)
        except DimensionFailed as error:
            run.failed[dimension] = str(error)
        with new_file(run.out / FILE) as temporary:
            temporary.write_text(json.dumps(content(run), indent=2, ensure_ascii=False) + "\n")
    progress("dimensions", len(run.dimensions), len(run.dimensions))
    if run.failed:
        why = "; ".join(f"{name}: {said}" for name, said in run.failed.items())
        raise RunFailed(f"{len(run.scores)} dimensions are in {run.out / FILE}; without: {why}")
    return _lines(content(run), run.out)


def content(run: VBenchRun) -> dict:
    """What vbench.json holds."""
    complete = {x: run.scores[x] for x in run.scores if not run.videos[x].missing and run.entries}
    complete = {} if _of_images(run) else complete
    return {
        "videos": str(run.folder),
        "prompts": "custom" if run.entries is None else str(run.info),
        "dimensions": {
            name: {
                "score": score,
                "normalised": normalised(name, score),
                "videos": len(run.videos[name].files),
                "missing": len(run.videos[name].missing),
                "by": "vdit-sparse" if name in NATIVE else "vbench 0.1.5",
            }
            for name, score in run.scores.items()
        },
        "failed": run.failed,
        "totals": totals(complete),
        "notes": _notes(run),
    }


def set_up(folder: Path) -> list[str]:
    """Makes VBench's environment in a new folder, and returns lines that say what it cannot do.

    Raises InputError where there is no suitable Python, and RunFailed where pip fails.
    """
    if folder.exists():
        raise InputError(f"--setup {folder} is there already: name a new folder.")
    python = _suitable_python()
    for command in ([python, "-m", "venv", str(folder)], _pip(folder)):
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise RunFailed(f"`{' '.join(command)}` failed: {' '.join(said)}")
    dimensions = ", ".join(NEEDS_DETECTRON)
    return [
        f"next: vdit-sparse eval vbench --videos DIR --python {folder / 'bin' / 'python'}",
        f"{dimensions} need detectron2, which is not on PyPI: "
        f"{folder / 'bin' / 'pip'} install --no-build-isolation {DETECTRON}",
    ]


def _pip(folder: Path) -> list[str]:
    return [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *PACKAGES]


def _suitable_python() -> str:
    least, most = PYTHONS
    if least <= sys.version_info[:2] <= most:
        return sys.executable
    found = next(filter(None, (shutil.which(f"python3.{x}") for x in (11, 10, 9))), None)
    if found is None:
        raise InputError(
            "VBench 0.1.5 needs Python 3.9 to 3.11 (its pinned tokenizers has no newer wheel): "
            "install python3.11."
        )
    return found


def _score(run: VBenchRun, dimension: str) -> float:
    videos = run.videos[dimension]
    if dimension in NATIVE:
        return flickering(videos.files)
    if run.python is None:
        raise DimensionFailed(
            "it needs VBench's environment: `vdit-sparse eval vbench --setup ENV` makes it, then "
            "add --python ENV/bin/python"
        )
    return by_package(run.python, dimension, videos, run.info, run.out, run.device)


def _of_images(run: VBenchRun) -> bool:
    """Whether the prompts are VBench-I2V's, whose totals are others."""
    return any("image_name" in entry for entry in run.entries or ())


def _notes(run: VBenchRun) -> list[str]:
    notes = []
    if _of_images(run):
        notes.append(
            "the prompts are VBench-I2V's: its own three dimensions and its totals are not here, "
            "see docs/evaluation.md"
        )
    if run.entries is None:
        notes.append("the videos are not of VBench's prompts: no totals")
    for name, videos in run.videos.items():
        if videos.missing:
            first = videos.missing[0]
            notes.append(f"{name}: {len(videos.missing)} videos are missing, the first {first!r}")
    lengths = [seconds(videos.files[0]) for videos in run.videos.values() if videos.files][:1]
    if lengths and lengths[0] >= LONG_SECONDS:
        notes.append(
            f"the videos are {lengths[0]:.2f} s long: for 5 s and more VBench-Long is meant, whose "
            "scores differ from these"
        )
    return notes


def _lines(found: dict, out: Path) -> list[str]:
    lines = [
        f"{name:<23}{each['score']:8.4f}  normalised {each['normalised']:7.4f}  "
        f"{each['videos']} videos"
        for name, each in found["dimensions"].items()
    ]
    for name, value in found["totals"].items():
        said = "-  (not all of its dimensions are complete)" if value is None else f"{value:.4f}"
        lines.append(f"{name:<23}{said:>8}")
    return [*lines, *(f"note: {note}" for note in found["notes"]), str(out / FILE)]
