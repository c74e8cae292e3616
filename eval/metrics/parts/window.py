"""The Gaussian window of SSIM and MS-SSIM, and what is compared in it."""

import torch
from torch import Tensor

from vdit_sparse.eval.frames import PEAK

WINDOW = 11
SIGMA = 1.5


def likeness(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM and its contrast-and-structure term at each place where the window fits.

    x, y: float64 frames `[C, H, W]` of 0 to 255 -> two maps `[C, H - 10, W - 10]`.

        ssim = (2 mx my + C1) / (mx^2 + my^2 + C1) * cs,  cs = (2 sxy + C2) / (sx^2 + sy^2 + C2)

    with mx the mean, sx^2 the variance and sxy the covariance under a Gaussian of 11 x 11 pixels
    with sigma 1.5, C1 = (0.01 * 255)^2 and C2 = (0.03 * 255)^2.
    """
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    mx, my, mxx, myy, mxy = blur(torch.stack([x, y, x * x, y * y, x * y]))
    variances, covariance = mxx - mx * mx + myy - my * my, mxy - mx * my
    contrast = (2 * covariance + c2) / (variances + c2)
    return (2 * mx * my + c1) / (mx * mx + my * my + c1) * contrast, contrast


def blur(x: Tensor, size: int = WINDOW, sigma: float = SIGMA) -> Tensor:
    """The Gaussian-weighted mean of `[..., H, W]`, only where a window of `size` pixels fits."""
    distance = torch.arange(size) - size // 2
    weights = torch.exp(-(distance.double() ** 2) / (2 * sigma**2))
    weights = (weights / weights.sum()).tolist()
    for axis in (-2, -1):
        # A sum of shifted copies: several times faster on a CPU than a convolution in fp64.
        places = x.shape[axis] - size + 1
        blurred = torch.zeros_like(x.narrow(axis, 0, places))
        for shift, weight in enumerate(weights):
            blurred.add_(x.narrow(axis, shift, places), alpha=weight)
        x = blurred
    return x
