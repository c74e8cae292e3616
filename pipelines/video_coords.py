"""Where a video stands among tokens of which only the coordinates are known."""

from typing import NamedTuple

import torch
from torch import Tensor

from vdit_sparse.grid import Grid


class _Frame(NamedTuple):
    first: int
    tokens: int
    width: int
    time: float

    def continues(self, former: "_Frame") -> bool:
        return self[1:3] == former[1:3] and self.time > former.time


def find_video(coords: Tensor) -> tuple[Grid, int]:
    """The grid of a video among other tokens (conditions, keyframes, references), and how many of
    those stand before it.

    coords: time, height and width of every token, `[3, S]`. A frame is a raster of tokens at one
    time; the video is the largest series of frames of one size whose times rise, the first of them
    if several are as large. Waits for the device. Raises ValueError for a frame that is no raster.
    """
    coords = coords.cpu()
    series: list[list[_Frame]] = []
    for frame in _frames(*coords):
        if series and frame.continues(series[-1][-1]):
            series[-1].append(frame)
        else:
            series.append([frame])
    video = max(series, key=lambda frames: len(frames) * frames[0].tokens)
    lead, tokens, width, _ = video[0]
    text = coords.shape[1] - len(video) * tokens
    return Grid(len(video), tokens // width, width, text), lead


def _frames(time: Tensor, row: Tensor, column: Tensor) -> list[_Frame]:
    down, across = row.diff(), column.diff()
    new = (time.diff() != 0) | (down < 0) | ((down == 0) & (across <= 0))
    starts = [0, *(torch.nonzero(new).flatten() + 1).tolist()]
    ends = [*starts[1:], len(time)]
    return [
        _Frame(start, end - start, _width(row[start:end]), float(time[start]))
        for start, end in zip(starts, ends, strict=True)
    ]


def _width(rows: Tensor) -> int:
    """Tokens in each row of a frame, of which `rows` are the heights."""
    widths = torch.unique_consecutive(rows, return_counts=True)[1]
    if (widths != widths[0]).any():
        raise ValueError(f"Expected a frame with rows of one width, got {widths.tolist()} tokens.")
    return int(widths[0])
