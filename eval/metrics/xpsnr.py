"""XPSNR of a video against its reference, by imageio-ffmpeg's ffmpeg."""

import re

import torch
from torch import Tensor

from vdit_sparse.eval.metrics.parts.ffmpeg import LOG, compared, filter_missing

CAP = 100.0
SMALLEST = 16


def xpsnr_per_frame(video: Tensor, reference: Tensor) -> Tensor:
    """Perceptually weighted PSNR of each frame's luma, in dB, at most 100: float64 `[T]`.

    Helmrich et al., "XPSNR: a low-complexity extension of the perceptually weighted peak
    signal-to-noise ratio", ICASSP 2020: errors count less in blocks with more texture or motion.
    The motion is that of 16 frames a second. The first frame counts as moving everywhere (ffmpeg
    compares it with black) and so gets some dB more. Frames without an error count as 100 dB.

    video, reference: RGB `[T, 3, H, W]`, uint8, or float in [0, 1], sides of at least 16 pixels;
    ValueError if they differ in shape or are no such videos.
    """
    # ffmpeg calls the first input "main" and takes it for the original: its texture is what counts.
    log = compared(video, reference, f"[b][a]xpsnr=stats_file={LOG}", SMALLEST)
    values = re.findall(r"n:\s*\d+\s+XPSNR y:\s*(\S+)", log)
    return torch.tensor([float(each) for each in values], dtype=torch.float64).clamp(max=CAP)


def unavailable() -> str | None:
    return filter_missing("xpsnr")
