"""ST-LPIPS of a video against its reference: how different its frames look to a network."""

from functools import cache

import torch
from torch import Tensor

from vdit_sparse.eval.frames import levels
from vdit_sparse.eval.metrics.parts.batches import over_frames, unit
from vdit_sparse.eval.metrics.parts.colour import rgb
from vdit_sparse.eval.metrics.parts.sources import EVAL_EXTRA, missing, package_file
from vdit_sparse.pipelines.mini.training.st_lpips import SMALLEST, PerceptualDistance


def st_lpips_per_frame(video: Tensor, reference: Tensor) -> Tensor:
    """Shift-tolerant LPIPS of each frame, 0 for equal ones: float64 `[T]`.

    Ghildyal and Liu, ECCV 2022, arXiv 2207.13686, with AlexNet; the published weights, as the
    package stlpips-pytorch carries them (`unavailable` says if it does not). Its values are no
    LPIPS values: compare them with each other only.

    video, reference: RGB `[T, 3, H, W]`, uint8, or float in [0, 1], sides of at least 32 pixels;
    ValueError if they differ in shape or are no such videos.
    """
    pair = rgb(levels(video, reference)), rgb(levels(reference, video))
    if min(video.shape[-2:]) < SMALLEST:
        raise ValueError(
            f"ST-LPIPS needs frames of at least {SMALLEST} x {SMALLEST} pixels, got "
            f"{video.shape[-2]} x {video.shape[-1]}."
        )
    network = _network(video.device)
    return over_frames(lambda x, y: network(unit(x) * 2 - 1, unit(y) * 2 - 1), *pair).double()


def unavailable() -> str | None:
    return missing(_weights(), "the package stlpips-pytorch (64 MB)", EVAL_EXTRA)


def _weights():
    return package_file("stlpips_pytorch", "weights/vST0.0/alex_shift_tolerant.pth")


@cache
def _network(device: torch.device) -> PerceptualDistance:
    return PerceptualDistance(_weights()).to(device)
