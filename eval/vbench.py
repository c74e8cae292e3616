"""VBench (arXiv 2311.17982) on a folder of videos: its dimensions, normalisation and totals.

Temporal flickering needs no weights and runs here; the other dimensions run in the package `vbench`
in an environment of its own, for its pins exclude current diffusers.
"""

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import torch
from torch import Tensor

from vdit_sparse.eval.files import marked_stem
from vdit_sparse.eval.metrics import METRICS

# Dimension -> its weight in the total it belongs to (VBench, scripts/constant.py).
QUALITY = {
    "subject_consistency": 1.0,
    "background_consistency": 1.0,
    "temporal_flickering": 1.0,
    "motion_smoothness": 1.0,
    "aesthetic_quality": 1.0,
    "imaging_quality": 1.0,
    "dynamic_degree": 0.5,
}
SEMANTIC = dict.fromkeys(
    (
        "object_class",
        "multiple_objects",
        "human_action",
        "color",
        "spatial_relationship",
        "scene",
        "appearance_style",
        "temporal_style",
        "overall_consistency",
    ),
    1.0,
)
DIMENSIONS = (*QUALITY, *SEMANTIC)
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4, 1
# (least, most) of those whose normalisation is not from 0 to 1.
RANGES = {
    "subject_consistency": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    "temporal_flickering": (0.6293, 1.0),
    "motion_smoothness": (0.706, 0.9975),
    "scene": (0.0, 0.8222),
    "appearance_style": (0.0009, 0.2855),
    "temporal_style": (0.0, 0.364),
    "overall_consistency": (0.0, 0.364),
}
# Those that read what the prompt names from VBench's own list, and so run on its prompts only.
STANDARD_ONLY = ("object_class", "multiple_objects", "scene", "appearance_style", "color")
STANDARD_ONLY += ("spatial_relationship",)
NATIVE = ("temporal_flickering",)
SAMPLES = 5  # videos of a prompt
LONG_SECONDS = 5.0
AS_OPENCV_4 = ["-vf", "scale=in_color_matrix=bt601:flags=bicubic", "-fps_mode", "passthrough"]
DRIVER = Path(__file__).with_name("vbench_driver.py")


class DimensionFailed(RuntimeError):
    """A dimension has no score; one line says why."""


@dataclass(frozen=True)
class Videos:
    """The videos of a dimension, in VBench's order; `missing`: the names that VBench would look for
    and that are not there; standard: whether they are of VBench's prompts. names: what VBench
    calls each."""

    files: tuple[Path, ...]
    names: tuple[str, ...]
    missing: tuple[str, ...] = ()
    standard: bool = True


def videos_of(folder: Path, dimension: str, entries: Sequence[Mapping] | None) -> Videos:
    """The videos that a dimension looks at: `{prompt}-{0..4}.mp4` of its prompts (a prompt that is
    twice in VBench's list counts twice, as there), or all of the folder where `entries`, the
    content of VBench_full_info.json, is None. Raises DimensionFailed if there is none."""
    here = {file.name: file for file in sorted(folder.glob("[!.]*.mp4"))}
    if entries is None:
        if dimension in STANDARD_ONLY:
            raise DimensionFailed("it runs on VBench's own prompts only: give --prompts")
        files, names, missing = list(here.values()), list(here), []
    else:
        files, names, missing = [], [], []
        for entry in entries:
            if dimension not in entry["dimension"]:
                continue
            for index in range(SAMPLES):
                name = f"{entry['prompt_en']}-{index}.mp4"
                ours = f"{marked_stem(entry['prompt_en'])}-{index}.mp4"
                file = here.get(name) or here.get(ours)
                if file is None:
                    missing.append(name)
                else:
                    files.append(file)
                    names.append(name)
    if not files:
        raise DimensionFailed(f"there are none of its videos in {folder}")
    return Videos(tuple(files), tuple(names), tuple(missing), entries is not None)


def flickering(files: Sequence[Path]) -> float:
    """VBench's temporal_flickering: the mean over videos of 1 - mean |difference| / 255 of
    neighbouring frames. Raises DimensionFailed for a file that cannot be read."""
    metric = METRICS["temporal_flickering"]
    try:
        return sum(metric(read_frames(file)) for file in files) / len(files)
    except ValueError as error:
        raise DimensionFailed(str(error)) from error


def read_frames(file: Path) -> Tensor:
    """Frames uint8 `[T, 3, H, W]`, the very ones that VBench sees: OpenCV 4, to which its pins hold
    it, takes every video for BT.601, whatever its tags say; OpenCV 5 does not."""
    reader = imageio_ffmpeg.read_frames(str(file), output_params=AS_OPENCV_4)
    try:
        width, height = next(reader)["size"]
        frames = [torch.frombuffer(bytearray(each), dtype=torch.uint8) for each in reader]
    except (OSError, StopIteration) as error:
        raise DimensionFailed(f"{file} cannot be decoded: remove it, and make it again") from error
    if not frames:
        raise DimensionFailed(f"{file} has no frames: remove it, and make it again")
    return torch.stack(frames).view(-1, height, width, 3).permute(0, 3, 1, 2)


def seconds(file: Path) -> float:
    """How long a video is, by its header; 0 where it cannot be read."""
    reader = imageio_ffmpeg.read_frames(str(file))
    try:
        return next(reader)["duration"]
    except (OSError, StopIteration):
        return 0.0
    finally:
        reader.close()


def by_package(
    python: Path, dimension: str, videos: Videos, info: Path | None, out: Path, device: str | None
) -> float:
    """A dimension's score by the package `vbench` in the environment of `python`, from a folder of
    links that have VBench's names. Its own files stay in `out`. Raises DimensionFailed with the
    last line that it said."""
    out = out.resolve()
    links = out / "videos" / dimension
    links.mkdir(parents=True, exist_ok=True)
    for old in links.iterdir():
        old.unlink()
    for name, file in dict(zip(videos.names, videos.files, strict=True)).items():
        (links / name).symlink_to(file.resolve())
    asked = {
        "videos": str(links),
        "info": str(info.resolve()) if info else "",
        "out": str(out),
        "dimension": dimension,
        "mode": "vbench_standard" if videos.standard else "custom_input",
        "device": device,
    }
    result = out / f"{dimension}_eval_results.json"
    result.unlink(missing_ok=True)
    # As text and away from here: beside the driver's file `import vbench` would find this one.
    command = [str(python), "-c", DRIVER.read_text(encoding="utf-8"), json.dumps(asked)]
    heard = {"capture_output": True, "text": True, "errors": "replace"}
    try:
        done = subprocess.run(command, cwd=out, **heard)
    except OSError as error:
        raise DimensionFailed(f"cannot run --python {python} ({error.strerror})") from error
    (out / f"{dimension}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise DimensionFailed(f"{said} (all of it: {out / f'{dimension}.log'})")
    try:
        return float(json.loads(result.read_text())[dimension][0])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise DimensionFailed(f"vbench wrote no score into {result} ({error!r})") from error


def normalised(dimension: str, score: float) -> float:
    """A score between the least and most that VBench takes for possible, as 0 to 1."""
    least, most = RANGES.get(dimension, (0.0, 1.0))
    return (score - least) / (most - least)


def totals(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Quality, Semantic and Total by VBench's weights, each None unless all of its dimensions are
    in `scores` (VBench's own script counts a missing one as 0)."""
    parts = {"quality": _mean(scores, QUALITY), "semantic": _mean(scores, SEMANTIC)}
    quality, semantic = parts.values()
    if quality is None or semantic is None:
        return {**parts, "total": None}
    weighted = QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic
    return {**parts, "total": weighted / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)}


def _mean(scores: Mapping[str, float], weights: Mapping[str, float]) -> float | None:
    if not set(weights) <= set(scores):
        return None
    weighted = (weight * normalised(name, scores[name]) for name, weight in weights.items())
    return sum(weighted) / sum(weights.values())
