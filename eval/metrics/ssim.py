"""SSIM of a video against its reference, on 8-bit frames before any video codec."""

import torch
from torch import Tensor

from vdit_sparse.eval.frames import levels
from vdit_sparse.eval.metrics.parts.window import WINDOW, likeness


def ssim(video: Tensor, reference: Tensor) -> float:
    """Mean over frames of the structural similarity, 1 for equal videos, at least -1.

    video, reference: `[T, C, H, W]`, uint8, or float in [0, 1] (rounded to 8 bits first), of at
        least 11 x 11 pixels. Raises ValueError if they differ in shape or are no such videos.
    """
    return ssim_per_frame(video, reference).mean().item()


def ssim_per_frame(video: Tensor, reference: Tensor) -> Tensor:
    """SSIM of each frame: float64 `[T]`. Arguments and errors are those of `ssim`.

    Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004,
    Eq. 13, in a Gaussian window of 11 x 11 pixels with sigma 1.5 (`parts/window.py`), averaged over
    channels and all places where the window lies in the frame.
    Each channel is compared for itself. As in the authors' code and scikit-image, and unlike
    torchmetrics 1.9, no place counts where the window would reach over the border.
    """
    frames = zip(levels(video, reference), levels(reference, video), strict=True)
    if min(video.shape[-2:]) < WINDOW:
        raise ValueError(
            f"SSIM needs frames of at least {WINDOW} x {WINDOW} pixels, got "
            f"{video.shape[-2]} x {video.shape[-1]}."
        )
    # Frame by frame, which bounds the memory: the maps of a clip in fp64 are many gigabytes.
    return torch.stack([likeness(x.double(), y.double())[0].mean() for x, y in frames])
