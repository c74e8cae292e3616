"""Frames through a function a few at a time, which bounds the memory of networks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from vdit_sparse.eval.frames import PEAK

FRAMES = 4


@contextmanager
def exact() -> Iterator[None]:
    """Without gradients, and with convolutions of a GPU in full float32 and the same every time."""
    in_full = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    with torch.no_grad(), in_full:
        yield


@exact()
def over_frames(function: Callable[..., Tensor], *videos: Tensor, frames: int = FRAMES) -> Tensor:
    """`function` of some frames of each video at a time; its results, one a frame, joined."""
    parts = zip(*(video.split(frames) for video in videos), strict=True)
    return torch.cat([function(*part) for part in parts])


def unit(frames: Tensor) -> Tensor:
    """8-bit frames as float32 in [0, 1]."""
    return frames.float() / PEAK
