"""The files of `vdit-sparse eval report`: report.md, methods.csv, samples.csv and report.html."""

import base64
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import imageio_ffmpeg
import torch
from PIL import Image
from torch import Tensor

from vdit_sparse.app.options import InputError
from vdit_sparse.app.video import Panel, side_by_side, write_image, write_video
from vdit_sparse.eval.files import new_file
from vdit_sparse.eval.metrics import METRICS
from vdit_sparse.eval.report import Findings, Line, heading, read_findings
from vdit_sparse.eval.report_page import Shown, markdown, methods_csv, page, samples_csv
from vdit_sparse.eval.store import StoreError

GAIN = 4


def write_report(folders: Sequence[str], out: str | None, worst: int) -> list[str]:
    """Writes the files, and returns their paths.

    worst: how many samples of each method to show. Raises InputError for folders that do not
    compare, that hold no finished samples, or cannot be written to.
    """
    homes = [Path(folder) for folder in folders]
    target = homes[0] / "report" if out is None else Path(out)
    try:
        findings = read_findings(homes)
    except StoreError as error:
        raise InputError(str(error)) from error
    shown = {
        line.label: [show_sample(findings, row) for row in worst_rows(findings, line, worst)]
        for line in findings.lines
    }
    texts = {
        "report.md": markdown(findings),
        "methods.csv": methods_csv(findings),
        "samples.csv": samples_csv(findings),
        "report.html": page(findings, shown),
    }
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            with new_file(target / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"Cannot write to {target} ({error.strerror}).") from error
    return [str(target / name) for name in texts]


def worst_rows(findings: Findings, line: Line, count: int) -> list[dict]:
    """The samples of a method that are furthest from dense, by the first metric that compares."""
    if line.name == "dense" or not findings.compared:
        return []
    metric = findings.compared[0]
    sign = 1 if METRICS[metric].higher_is_better else -1
    measured = [row for row in line.rows if metric in row["metrics"]]
    return sorted(measured, key=lambda row: sign * row["metrics"][metric])[:count]


def show_sample(findings: Findings, row: Mapping) -> Shown:
    """Dense, the sample and their difference beside each other, from the files of the folder; one
    that is missing or broken is said to be, and the report goes on."""
    sample = (row["prompt"], row["seed"])
    dense = [
        other for other in findings.lines[0].rows if (other["prompt"], other["seed"]) == sample
    ]
    try:
        pair = [read_frames(findings.homes[x["key"]] / x["file"]) for x in (*dense, row)]
    except (OSError, StopIteration, SyntaxError) as error:
        return Shown(row, "", f"There is no picture: {' '.join(str(error).split())[:200]}")
    if len(pair) != 2 or pair[0].shape != pair[1].shape:
        return Shown(row, "", "There is no picture: the two files differ in size.")
    metric = findings.compared[0]
    panels = [
        Panel(pair[0], "dense", "the reference"),
        Panel(pair[1], row["method"]["label"], f"{heading(metric)} {row['metrics'][metric]:.4g}"),
        Panel(difference(*pair), f"{GAIN} x the difference", "grey where there is none"),
    ]
    return Shown(row, _data_uri(side_by_side(panels), findings.protocol["settings"]["fps"]))


def difference(one: Tensor, other: Tensor) -> Tensor:
    """Four times `other - one` around middle grey, uint8 as the two."""
    return (128 + GAIN * (other.int() - one.int())).clamp(0, 255).to(torch.uint8)


def read_frames(file: Path) -> Tensor:
    """Frames uint8 `[T, 3, H, W]` of an mp4 or PNG. Raises OSError for a file that is not there or
    cannot be decoded."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    if file.suffix == ".png":
        image = Image.open(file).convert("RGB")
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return pixels.view(1, image.height, image.width, 3).permute(0, 3, 1, 2)
    reader = imageio_ffmpeg.read_frames(str(file))
    width, height = next(reader)["size"]
    frames = [torch.frombuffer(bytearray(each), dtype=torch.uint8) for each in reader]
    if not frames:
        raise OSError(f"{file} has no frames")
    return torch.stack(frames).view(-1, height, width, 3).permute(0, 3, 1, 2)


def _data_uri(frames: Tensor, fps: float) -> str:
    with tempfile.TemporaryDirectory() as folder:
        if len(frames) == 1:
            file, kind = Path(folder) / "x.png", "image/png"
            write_image(file, frames[0])
        else:
            file, kind = Path(folder) / "x.mp4", "video/mp4"
            write_video(file, frames, fps)
        return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
