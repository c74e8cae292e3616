"""Frames to files: mp4 or PNG, labelled side-by-side, contact sheet; never a partial file."""

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vdit_sparse.eval.files import new_file

# Visually lossless; the metrics never see these files.
CRF = "12"
# Written and tagged as BT.709, so that players show the colours of the frames.
COLOUR = ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"]
CONVERT = ["-vf", "scale=out_color_matrix=bt709:out_range=tv"]

COLUMNS = 3
SHEET_FRAMES = 5
SHEET_WIDTHS = (256, 448)
SMALLEST_PANEL = 320
GAP = 8
# Points of the font that Pillow brings along.
HEADING, TEXT, FINE = 24, 18, 13
INK, FAINT, PAPER = (245, 245, 245), (165, 170, 180), (22, 24, 28)


@dataclass(frozen=True, eq=False)
class Panel:
    """One run as the side-by-side and the sheet show it.

    frames: uint8 `[T, 3, H, W]`; title, caption: the two lines of its label.
    """

    frames: Tensor
    title: str
    caption: str = ""


def file_of(name: str, frames: Tensor) -> str:
    """What the file of frames `[T, 3, H, W]` is called: an mp4, of one frame a PNG."""
    return f"{name}.png" if len(frames) == 1 else f"{name}.mp4"


def write_clip(path: Path, frames: Tensor, fps: float) -> None:
    """Frames uint8 `[T, 3, H, W]` as `write_video`, a single one as `write_image`: a path that
    `file_of` named. An image keeps an odd size and every pixel."""
    if len(frames) == 1:
        write_image(path, frames[0])
    else:
        write_video(path, frames, fps)


def write_video(path: Path, frames: Tensor, fps: float) -> None:
    """Frames uint8 `[T, 3, H, W]` as H.264, yuv420p, at `fps`.

    An odd height or width, which yuv420p cannot have, gets its last row or column twice. Raises
    OSError if ffmpeg fails or wrote another number of frames.
    """
    frames = _even(frames).permute(0, 2, 3, 1).contiguous()
    count, height, width, _ = frames.shape
    with new_file(path) as temporary:
        writer = imageio_ffmpeg.write_frames(
            str(temporary),
            (width, height),
            fps=fps,
            codec="libx264",
            quality=None,
            macro_block_size=1,
            output_params=["-crf", CRF, "-movflags", "+faststart", *CONVERT, *COLOUR],
        )
        with contextlib.closing(writer):
            writer.send(None)
            for frame in frames.numpy():
                writer.send(frame)
        written, _ = imageio_ffmpeg.count_frames_and_secs(str(temporary))
        if written != count:
            raise OSError(f"ffmpeg wrote {written} of {count} frames to {temporary}.")


def write_image(path: Path, image: Tensor) -> None:
    """An image uint8 `[3, H, W]` as PNG."""
    with new_file(path) as temporary:
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(temporary, format="PNG")


def side_by_side(panels: Sequence[Panel]) -> Tensor:
    """The runs beside each other, up to three in a row, each under its label: uint8 `[T, 3, H, W]`.

    Small frames are enlarged by a whole number, so that the labels are readable.
    """
    width = panels[0].frames.shape[-1]
    factor = max(1, math.ceil(SMALLEST_PANEL / width))
    cells = []
    for panel in panels:
        frames = panel.frames.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        size = max(TEXT, frames.shape[-1] // 40)
        label = _label(frames.shape[-1], [panel.title, panel.caption], size)
        cells.append(torch.cat([label.expand(len(frames), -1, -1, -1), frames], dim=2))
    columns = min(COLUMNS, len(cells))
    cells += [_plain(cells[0].shape)] * (-len(cells) % columns)
    rows = [_join(cells[i : i + columns], axis=3) for i in range(0, len(cells), columns)]
    return _even(_join(rows, axis=2))


def contact_sheet(panels: Sequence[Panel], heading: str = "") -> Tensor:
    """One row a run, five frames from first to last in each, under its label: uint8 `[3, H, W]`."""
    count, _, height, width = panels[0].frames.shape
    shown = torch.linspace(0, count - 1, min(SHEET_FRAMES, count)).round().long().tolist()
    scale = min(max(width, SHEET_WIDTHS[0]), SHEET_WIDTHS[1]) / width
    size = (round(width * scale), round(height * scale))
    rows = []
    for panel in panels:
        pictures = [_resized(panel.frames[i], size) for i in shown]
        if panel is panels[0]:
            pictures = [
                torch.cat([_label(size[0], [f"frame {i}"], FINE), picture], dim=1)
                for i, picture in zip(shown, pictures, strict=True)
            ]
        row = _join(pictures, axis=2)
        rows += [_label(row.shape[-1], [panel.title, panel.caption], HEADING), row]
    if heading:
        rows.insert(0, _label(rows[0].shape[-1], [heading], HEADING))
    return _framed(torch.cat(rows, dim=1))


def _label(width: int, lines: Iterable[str], size: int = TEXT) -> Tensor:
    """Lines of text on the paper's colour, uint8 `[3, h, width]`: the first bright, others faint.

    A line that is too long is set smaller, and cut with an ellipsis where that is not enough.
    """
    height = round(1.45 * size)
    lines = [line for line in lines if line]
    image = Image.new("RGB", (width, height * len(lines) + GAP), PAPER)
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        bright = number == 0 and size != FINE
        text, font = _fitted(draw, line, width - GAP, size if number == 0 else size - 3)
        place = (GAP // 2, GAP // 2 + number * height + height // 2)
        draw.text(place, text, INK if bright else FAINT, font=font, anchor="lm")
    return _pixels(image)


def _fitted(draw: ImageDraw.ImageDraw, text: str, width: int, size: int):
    for smaller in range(size, 10, -1):
        font = ImageFont.load_default(smaller)
        if draw.textlength(text, font) <= width:
            return text, font
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…", font


def _resized(frame: Tensor, size: tuple[int, int]) -> Tensor:
    image = Image.fromarray(frame.permute(1, 2, 0).numpy())
    enlarged = size[0] >= 2 * image.width
    return _pixels(image.resize(size, Image.NEAREST if enlarged else Image.LANCZOS))


def _pixels(image: Image.Image) -> Tensor:
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)


def _join(parts: Sequence[Tensor], axis: int) -> Tensor:
    """Parts along an axis, with a gap between them."""
    shape = list(parts[0].shape)
    shape[axis] = GAP
    spaced = [x for part in parts for x in (_plain(shape), part)]
    return torch.cat(spaced[1:], dim=axis)


def _framed(image: Tensor) -> Tensor:
    height, width = image.shape[1:]
    page = _plain([3, height + 2 * GAP, width + 2 * GAP]).clone()
    page[:, GAP:-GAP, GAP:-GAP] = image
    return page


def _plain(shape: Sequence[int]) -> Tensor:
    """The paper's colour in a shape `[..., 3, H, W]`."""
    return torch.tensor(PAPER, dtype=torch.uint8).view(3, 1, 1).expand(*shape)


def _even(frames: Tensor) -> Tensor:
    height, width = frames.shape[-2:]
    rows = torch.arange(height + height % 2).clamp(max=height - 1)
    columns = torch.arange(width + width % 2).clamp(max=width - 1)
    return frames[..., rows, :][..., columns]
