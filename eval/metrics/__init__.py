"""The quality metrics by name, for reports and suites.

    from vdit_sparse.eval.metrics import ALL_METRICS
    metric = ALL_METRICS["lpips_alex"]
    metric.unavailable()                             # None, or why it cannot run and what to do
    inputs = {"video": frames, "reference": dense, "prompt": "a fox", "spec": spec, ...}
    given = [inputs[name] for name in metric.takes]  # ("video", "reference"), ("video",), ...
    metric(*given)                                   # float: the video's value
    metric.per_frame(*given)                         # float64 [N]: of frames, or pairs of frames
    metric.higher_is_better, metric.unit, metric.title

What `takes` can name:
    video, reference   `[T, C, H, W]` of one shape, uint8, or float in [0, 1] (rounded to 8 bits
                       first, as a video file would have it); RGB where the metric is about colour
    prompt             str
    spec               the `captions.Spec` that a prompt of the bundled model's grammar came from
    latents, reference_latents
                       `[C, T, H, W]`, floating point

Errors: ValueError for inputs that cannot be measured (shape, range, too few frames, too small),
`Unavailable` where `unavailable()` has a reason; both messages say what to do. A metric runs on the
device of its inputs as far as it can. Nothing is ever downloaded.

`METRICS` is the part of `ALL_METRICS` that every command prints: with a reference, and in need of
nothing but torch. Metrics of a whole set of videos accumulate (`FrechetDistance`).
"""

from vdit_sparse.eval.metrics.parts.metric import ALONE, PAIR, Metric, Unavailable
from vdit_sparse.eval.metrics.psnr import psnr, psnr_per_frame
from vdit_sparse.eval.metrics.ssim import ssim, ssim_per_frame

ALL_METRICS: dict[str, Metric] = {
    "psnr": Metric(
        title="PSNR", frame_values=psnr_per_frame, compute=psnr, higher_is_better=True, unit="dB"
    ),
    "ssim": Metric(title="SSIM", frame_values=ssim_per_frame, compute=ssim, higher_is_better=True),
}

METRICS: dict[str, Metric] = {name: ALL_METRICS[name] for name in ("psnr", "ssim")}

__all__ = [
    "ALL_METRICS",
    "ALONE",
    "METRICS",
    "PAIR",
    "Metric",
    "Unavailable",
    "psnr",
    "psnr_per_frame",
    "ssim",
    "ssim_per_frame",
]
