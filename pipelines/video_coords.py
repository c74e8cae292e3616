"""Where a video stands among tokens of which only the coordinates are known."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from vdit_sparse.grid import Grid


class _Frame(NamedTuple):
    first: int
    tokens: int
    width: int
    time: float
    end: float | None

    def continues(self, former: "_Frame") -> bool:
        later = self.time > former.time if former.end is None else self.time == former.end
        return later and self[1:3] == former[1:3]


def find_video(coords: Tensor, ends: Tensor | None = None) -> tuple[Grid, int]:
    """The grid of a video among other tokens (conditions, keyframes, references), and how many of
    those stand before it.

    coords: time, height and width of every token, `[3, S]`; ends: time at which every token ends,
    `[S]`, where the model knows it. A frame is a raster of tokens at one time; the video is the
    largest series of frames of one size in which each begins where the last one ended, or if that
    is not known, later; the first of them if several are as large. Waits for the device. Raises
    ValueError where the largest series is of no rasters.
    """
    coords, ends = coords.cpu(), None if ends is None else ends.cpu()
    series: list[list[_Frame]] = []
    for frame in _frames(*coords, ends):
        if series and frame.continues(series[-1][-1]):
            series[-1].append(frame)
        else:
            series.append([frame])
    video = max(series, key=lambda frames: len(frames) * frames[0].tokens)
    lead, tokens, width = video[0][:3]
    if not width:
        raise ValueError(f"Expected a video among {coords.shape[1]} tokens: frames of equal rows.")
    text = coords.shape[1] - len(video) * tokens
    return Grid(len(video), tokens // width, width, text), lead


def _frames(time: Tensor, row: Tensor, column: Tensor, ends: Tensor | None) -> list[_Frame]:
    down, across = row.diff(), column.diff()
    new = (time.diff() != 0) | (down < 0) | ((down == 0) & (across <= 0))
    edges = [0, *(torch.nonzero(new).flatten() + 1).tolist(), len(time)]
    return [
        _Frame(
            first,
            last - first,
            _width(row[first:last]),
            float(time[first]),
            None if ends is None else float(ends[first]),
        )
        for first, last in pairwise(edges)
    ]


def _width(rows: Tensor) -> int:
    """Tokens in each row of a frame, of which `rows` are the heights; 0 if the rows differ."""
    widths = torch.unique_consecutive(rows, return_counts=True)[1]
    return int(widths[0]) if (widths == widths[0]).all() else 0
