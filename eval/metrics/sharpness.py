"""Sharpness of a video's frames: the variance of their Laplacian."""

import torch.nn.functional as F
from torch import Tensor

from vdit_sparse.eval.frames import levels
from vdit_sparse.eval.metrics.parts.batches import over_frames
from vdit_sparse.eval.metrics.parts.colour import luma


def sharpness_per_frame(video: Tensor) -> Tensor:
    """The variance of the Laplacian of each frame's luma: float64 `[T]`, in squared 8-bit levels.

    Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy", 2000: the four-neighbour
    Laplacian, reflected at the borders as in OpenCV; its variance over pixels. Noise counts as
    sharpness, so a larger value is better only among videos of one content.

    video: `[T, C, H, W]`, C = 1 or 3 (RGB), uint8, or float in [0, 1], of at least 2 x 2 pixels;
    else ValueError.
    """
    frames = levels(video, video)
    if min(frames.shape[-2:]) < 2:
        raise ValueError(
            f"Sharpness needs frames of at least 2 x 2 pixels, got {tuple(frames.shape[-2:])}."
        )
    return over_frames(_of_frames, frames)


def _of_frames(frames: Tensor) -> Tensor:
    grey = luma(frames)
    padded = F.pad(grey[:, None], (1, 1, 1, 1), mode="reflect")[:, 0]
    across = padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
    along = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1]
    return (across + along - 4 * grey).flatten(1).var(1, correction=0)
