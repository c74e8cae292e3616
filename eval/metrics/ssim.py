"""SSIM of a video against its reference, on 8-bit frames before any video codec."""

import torch
from torch import Tensor

from vdit_sparse.eval.frames import PEAK, levels

WINDOW = 11
SIGMA = 1.5


def ssim(video: Tensor, reference: Tensor) -> float:
    """Mean over frames of the structural similarity, 1 for equal videos, at least -1.

    video, reference: `[T, C, H, W]`, uint8, or float in [0, 1] (rounded to 8 bits first), of at
        least 11 x 11 pixels. Raises ValueError if they differ in shape or are no such videos.
    """
    return ssim_per_frame(video, reference).mean().item()


def ssim_per_frame(video: Tensor, reference: Tensor) -> Tensor:
    """SSIM of each frame: float64 `[T]`. Arguments and errors are those of `ssim`.

    Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004,
    Eq. 13, in a Gaussian window w of 11 x 11 pixels with sigma 1.5:

        (2 mx my + C1) (2 sxy + C2) / ((mx^2 + my^2 + C1) (sx^2 + sy^2 + C2))

    with mx the mean, sx^2 the variance and sxy the covariance under w, C1 = (0.01 * 255)^2 and
    C2 = (0.03 * 255)^2; averaged over channels and all places where the window lies in the frame.
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
    return torch.stack([_ssim_map(x.double(), y.double()).mean() for x, y in frames])


def _ssim_map(x: Tensor, y: Tensor) -> Tensor:
    """The SSIM of two frames `[C, H, W]` at each place of the window, `[C, H - 10, W - 10]`."""
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    mx, my, mxx, myy, mxy = _blur(torch.stack([x, y, x * x, y * y, x * y]))
    variances, covariance = mxx - mx * mx + myy - my * my, mxy - mx * my
    likeness = (2 * mx * my + c1) * (2 * covariance + c2)
    return likeness / ((mx * mx + my * my + c1) * (variances + c2))


def _blur(x: Tensor) -> Tensor:
    """The window's weighted mean of `[..., H, W]`, only where it fits."""
    distance = torch.arange(WINDOW) - WINDOW // 2
    weights = torch.exp(-(distance.double() ** 2) / (2 * SIGMA**2))
    weights = (weights / weights.sum()).tolist()
    for axis in (-2, -1):
        # A sum of shifted copies: several times faster on a CPU than a convolution in fp64.
        places = x.shape[axis] - WINDOW + 1
        blurred = torch.zeros_like(x.narrow(axis, 0, places))
        for shift, weight in enumerate(weights):
            blurred.add_(x.narrow(axis, shift, places), alpha=weight)
        x = blurred
    return x
