"""PSNR of a video against its reference, on 8-bit frames before any video codec."""

import torch
from torch import Tensor

from vdit_sparse.eval.frames import PEAK, levels

CAP = 100.0


def psnr(video: Tensor, reference: Tensor) -> float:
    """Mean over frames of the peak signal-to-noise ratio, in dB, at most 100.

    video, reference: `[T, C, H, W]`, uint8, or float in [0, 1] (rounded to 8 bits first, as a video
        file would have it). Raises ValueError if they differ in shape or are no videos.

    The mean of per-frame values, not the PSNR of the mean error: a single bad frame stays visible
    as a low value and not as a low average of the whole.
    """
    return psnr_per_frame(video, reference).mean().item()


def psnr_per_frame(video: Tensor, reference: Tensor) -> Tensor:
    """PSNR of each frame, 10 log10(255^2 / MSE) over its channels and pixels, in dB: float64 `[T]`.

    Identical frames, whose ratio is infinite, count as 100 dB, and nothing counts as more.
    Arguments and errors are those of `psnr`.
    """
    error = levels(video, reference).double() - levels(reference, video).double()
    mse = error.square().flatten(1).mean(1)
    return (10 * torch.log10(PEAK**2 / mse)).clamp(max=CAP)
