"""The quality metrics by name, for reports and suites.

    from vdit_sparse.eval.metrics import METRICS
    metric = METRICS["lpips_alex"]
    metric.unavailable()                             # None, or why it cannot run and what to do
    inputs = {"video": frames, "reference": dense, "prompt": "a fox", "spec": spec, ...}
    given = [inputs[name] for name in metric.takes]  # ("video", "reference"), ("video",), ...
    metric(*given)                                   # float: the video's value
    metric.per_frame(*given)                         # float64 [N]: of frames, or pairs of frames
    metric.higher_is_better, metric.unit, metric.title, metric.least_frames

What `takes` can name:
    video, reference   `[T, C, H, W]` of one shape, uint8, or float in [0, 1] (rounded to 8 bits
                       first, as a video file would have it); RGB where the metric is about colour
    prompt             str
    spec               the `captions.Spec` that a prompt of the bundled model's grammar came from
    latents, reference_latents
                       `[C, T, H, W]`, floating point

Errors: ValueError for inputs that cannot be measured (shape, range, too few frames, too small),
`Unavailable` where `unavailable()` has a reason, or ffmpeg fails; the messages say what to do. A
metric runs on the device of its inputs as far as it can. Nothing is ever downloaded.

`QUICK_METRICS` is the part of `METRICS` that every command prints: with a reference, and in need of
nothing but torch. Metrics of a whole set of videos accumulate (`FrechetDistance`).
"""

from functools import partial

from vdit_sparse.eval.metrics import adherence as judged
from vdit_sparse.eval.metrics import (
    clip_score,
    flow,
    lpips,
    mobilenet,
    niqe,
    rife,
    st_lpips,
    vmaf,
    xpsnr,
)
from vdit_sparse.eval.metrics.flicker import (
    flicker_difference_per_pair,
    motion_difference_per_pair,
    temporal_flickering_per_pair,
)
from vdit_sparse.eval.metrics.flip import flip_per_frame
from vdit_sparse.eval.metrics.frechet import FrechetDistance
from vdit_sparse.eval.metrics.latents import latent_error, latent_error_per_frame
from vdit_sparse.eval.metrics.ms_ssim import ms_ssim_per_frame
from vdit_sparse.eval.metrics.parts.metric import ALONE, LATENTS, Metric, Unavailable
from vdit_sparse.eval.metrics.psnr import psnr, psnr_per_frame
from vdit_sparse.eval.metrics.sharpness import sharpness_per_frame
from vdit_sparse.eval.metrics.ssim import ssim, ssim_per_frame

METRICS: dict[str, Metric] = {
    "psnr": Metric("PSNR", psnr_per_frame, unit="dB"),
    "ssim": Metric("SSIM", ssim_per_frame),
    "ms_ssim": Metric("MS-SSIM", ms_ssim_per_frame),
    "lpips_alex": Metric(
        "LPIPS (AlexNet)",
        partial(lpips.lpips_per_frame, trunk="alex"),
        higher_is_better=False,
        needs=partial(lpips.unavailable, "alex"),
    ),
    "lpips_vgg": Metric(
        "LPIPS (VGG)",
        partial(lpips.lpips_per_frame, trunk="vgg"),
        higher_is_better=False,
        needs=partial(lpips.unavailable, "vgg"),
    ),
    "st_lpips": Metric(
        "ST-LPIPS", st_lpips.st_lpips_per_frame, higher_is_better=False, needs=st_lpips.unavailable
    ),
    "flip": Metric("FLIP", flip_per_frame, higher_is_better=False),
    "vmaf": Metric("VMAF", vmaf.vmaf_per_frame, needs=vmaf.unavailable),
    "xpsnr": Metric("XPSNR", xpsnr.xpsnr_per_frame, unit="dB", needs=xpsnr.unavailable),
    "flicker_difference": Metric(
        "difference of flicker",
        flicker_difference_per_pair,
        higher_is_better=False,
        least_frames=2,
    ),
    "motion_difference": Metric(
        "difference of motion",
        motion_difference_per_pair,
        higher_is_better=False,
        unit="levels",
        least_frames=2,
    ),
    "latent_error": Metric(
        "relative error of latents",
        latent_error_per_frame,
        latent_error,
        takes=LATENTS,
        higher_is_better=False,
    ),
    "temporal_flickering": Metric(
        "temporal flickering (VBench)", temporal_flickering_per_pair, takes=ALONE, least_frames=2
    ),
    "sharpness": Metric("sharpness", sharpness_per_frame, takes=ALONE, unit="levels²"),
    "niqe": Metric(
        "NIQE", niqe.niqe_per_frame, takes=ALONE, higher_is_better=False, needs=niqe.unavailable
    ),
    "dis_motion": Metric(
        "motion (DIS flow)",
        flow.dis_motion_per_pair,
        takes=ALONE,
        unit="% of the shorter side",
        least_frames=2,
        needs=flow.unavailable,
    ),
    "mobilenet_consistency": Metric(
        "consistency (MobileNetV2)",
        mobilenet.mobilenet_consistency_per_frame,
        takes=ALONE,
        least_frames=2,
        needs=mobilenet.unavailable,
    ),
    "rife_smoothness": Metric(
        "smoothness (RIFE)",
        rife.rife_smoothness_per_frame,
        takes=ALONE,
        least_frames=3,
        needs=rife.unavailable,
    ),
    "clip_score": Metric(
        "CLIPScore",
        clip_score.clip_score_per_frame,
        takes=("video", "prompt"),
        needs=clip_score.unavailable,
    ),
    "adherence": Metric(
        judged.title(),
        compute=judged.judged_adherence,
        takes=("video", "spec"),
        needs=judged.unavailable,
    ),
}
"""Name -> metric: with a reference, of a video alone, with what the video should show."""

QUICK_METRICS: dict[str, Metric] = {name: METRICS[name] for name in ("psnr", "ssim")}

__all__ = [
    "METRICS",
    "QUICK_METRICS",
    "FrechetDistance",
    "Metric",
    "Unavailable",
    "psnr",
    "psnr_per_frame",
    "ssim",
    "ssim_per_frame",
]
