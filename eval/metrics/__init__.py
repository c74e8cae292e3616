"""The quality metrics by name, for reports and suites."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from vdit_sparse.eval.metrics.psnr import psnr, psnr_per_frame
from vdit_sparse.eval.metrics.ssim import ssim, ssim_per_frame


@dataclass(frozen=True)
class Metric:
    """A full-reference metric: calling it compares a video with its reference.

    compute: (video, reference), both `[T, C, H, W]` uint8 or float in [0, 1] -> float.
    higher_is_better: whether a larger value means closer to the reference.
    unit: for labels; empty for a plain number.
    """

    compute: Callable[[Tensor, Tensor], float]
    higher_is_better: bool
    unit: str = ""

    def __call__(self, video: Tensor, reference: Tensor) -> float:
        return self.compute(video, reference)


METRICS: dict[str, Metric] = {
    "psnr": Metric(psnr, higher_is_better=True, unit="dB"),
    "ssim": Metric(ssim, higher_is_better=True),
}

__all__ = ["METRICS", "Metric", "psnr", "psnr_per_frame", "ssim", "ssim_per_frame"]
