"""VMAF of a video against its reference, by libvmaf in imageio-ffmpeg's ffmpeg."""

import json

import torch
from torch import Tensor

from vdit_sparse.eval.metrics.parts.ffmpeg import LOG, compared, filter_missing

SMALLEST = 32


def vmaf_per_frame(video: Tensor, reference: Tensor) -> Tensor:
    """VMAF of each frame, 0 to 100, about 97 to 100 for equal videos: float64 `[T]`.

    Netflix' model vmaf_v0.6.1, trained for 1080p seen from three screen heights: at the sizes of
    most generated videos its values are comparable with each other only. A frame's motion term
    looks at its neighbours, so a part of a video has other values than the whole.

    video, reference: RGB `[T, 3, H, W]`, uint8, or float in [0, 1], sides of at least 32 pixels;
    ValueError if they differ in shape or are no such videos.
    """
    log = compared(video, reference, f"[a][b]libvmaf=log_fmt=json:log_path={LOG}", SMALLEST)
    frames = json.loads(log)["frames"]
    return torch.tensor([each["metrics"]["vmaf"] for each in frames], dtype=torch.float64)


def unavailable() -> str | None:
    return filter_missing("libvmaf")
