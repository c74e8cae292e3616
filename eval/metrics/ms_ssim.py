"""MS-SSIM of a video against its reference, on 8-bit frames before any video codec."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vdit_sparse.eval.frames import levels
from vdit_sparse.eval.metrics.parts.window import WINDOW, likeness

EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
SMALLEST = WINDOW * 2 ** (len(EXPONENTS) - 1)


def ms_ssim_per_frame(video: Tensor, reference: Tensor) -> Tensor:
    """Multi-scale SSIM of each frame, 1 for equal ones, at least 0: float64 `[T]`.

    Wang, Simoncelli and Bovik, "Multi-scale structural similarity for image quality assessment",
    2003, Eq. 7: over five scales, each half the size of the one before (means of 2 x 2 pixels),
    the product of the mean contrast-and-structure terms, at the last scale of the mean SSIM, each
    to its published exponent. A negative mean, to which no power exists, counts as 0. The window is
    that of `ssim`: no place counts where it would reach over the border (torchmetrics 1.9 counts
    the border at the last scale). Channels are compared together, by their mean at each scale.

    video, reference: `[T, C, H, W]`, uint8, or float in [0, 1], of at least 176 x 176 pixels.
    Raises ValueError if they differ in shape or are no such videos.
    """
    frames = zip(levels(video, reference), levels(reference, video), strict=True)
    if min(video.shape[-2:]) < SMALLEST:
        raise ValueError(
            f"MS-SSIM needs frames of at least {SMALLEST} x {SMALLEST} pixels for its five scales, "
            f"got {video.shape[-2]} x {video.shape[-1]}: use ssim."
        )
    return torch.stack([_of_frame(x.double(), y.double()) for x, y in frames])


def _of_frame(x: Tensor, y: Tensor) -> Tensor:
    product = x.new_ones(())
    for scale, exponent in enumerate(EXPONENTS):
        similarity, contrast = likeness(x, y)
        term = similarity if scale == len(EXPONENTS) - 1 else contrast
        product = product * term.mean().clamp(min=0) ** exponent
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return product
