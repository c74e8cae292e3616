"""Temporal flickering as VBench counts it, and how it and the motion differ from a reference's."""

from collections.abc import Iterator

import torch
from torch import Tensor

from vdit_sparse.eval.frames import PEAK, levels


def temporal_flickering_per_pair(video: Tensor) -> Tensor:
    """How still a video is: 1 - mean |difference| / 255 of neighbouring frames, float64 `[T - 1]`.

    VBench (arXiv 2311.17982), dimension `temporal_flickering`: the mean over all pairs is its value
    of a video (VBench reads its frames from a file; these are the frames given). 1 is a still.
    VBench asks for it on videos of still scenes only: elsewhere it rewards the lack of motion.

    video: `[T, C, H, W]`, uint8, or float in [0, 1], of at least two frames; else ValueError.
    """
    changes = _changes(levels(video, video))
    return 1 - torch.stack([change.abs().double().mean() for change in changes]) / PEAK


def flicker_difference_per_pair(video: Tensor, reference: Tensor) -> Tensor:
    """|temporal flickering of the video - that of the reference| for each pair of neighbouring
    frames: float64 `[T - 1]`, 0 where both change by the same amount, however different they are.

    video, reference: `[T, C, H, W]` as in `temporal_flickering_per_pair`, of one shape.
    """
    levels(video, reference)
    of_video = temporal_flickering_per_pair(video)
    return (of_video - temporal_flickering_per_pair(reference)).abs()


def motion_difference_per_pair(video: Tensor, reference: Tensor) -> Tensor:
    """The mean over pixels of |(x[t+1] - x[t]) - (y[t+1] - y[t])|, in 8-bit levels: `[T - 1]`.

    What moves otherwise than in the reference: a constant error of colour counts nothing, noise
    that is new in every frame counts in full.

    video, reference: `[T, C, H, W]` as in `temporal_flickering_per_pair`, of one shape.
    """
    changes = _changes(levels(video, reference)), _changes(levels(reference, video))
    pairs = zip(*changes, strict=True)
    return torch.stack([(change - other).abs().double().mean() for change, other in pairs])


def _changes(frames: Tensor) -> Iterator[Tensor]:
    """The difference of each 8-bit frame and the one before, int16 `[C, H, W]`."""
    if len(frames) < 2:
        raise ValueError("Expected at least two frames, got one: a still has no motion.")
    return (
        after.short() - before.short()
        for before, after in zip(frames[:-1], frames[1:], strict=True)
    )
