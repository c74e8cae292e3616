"""What holds for every metric of the table."""

import math
from pathlib import Path

import pytest
import torch

from tests.eval.metrics.clips import made, noisy, real
from vdit_sparse.eval.metrics import METRICS, QUICK_METRICS, Metric, Unavailable
from vdit_sparse.eval.metrics.parts.metric import ALONE, PAIR

KNOWN = {"video", "reference", "prompt", "spec", "latents", "reference_latents"}
PAIRED = [name for name, metric in METRICS.items() if metric.takes == PAIR]
OF_ONE = [name for name, metric in METRICS.items() if metric.takes == ALONE]
BEST = {"psnr": 100, "ssim": 1, "ms_ssim": 1, "xpsnr": 100, "vmaf": 100}


def runnable(name: str) -> Metric:
    metric = METRICS[name]
    if reason := metric.unavailable():
        pytest.skip(reason)
    return metric


def test_the_table_says_what_each_takes_and_needs():
    assert set(QUICK_METRICS) == {"psnr", "ssim"} and QUICK_METRICS.items() <= METRICS.items()
    for metric in METRICS.values():
        assert metric.takes and KNOWN.issuperset(metric.takes)
        reason = metric.unavailable()
        assert reason is None or len(reason) > 20
    assert len({metric.title for metric in METRICS.values()}) == len(METRICS)


@pytest.mark.parametrize("name", ["psnr", "ssim", "ms_ssim", "flip", "vmaf", "xpsnr"])
def test_what_needs_no_download_runs(name):
    assert METRICS[name].unavailable() is None


def test_a_metric_that_cannot_run_says_why():
    metric = Metric("x", lambda video: video, takes=ALONE, needs=lambda: "no weights: get them.")
    for call in (metric, metric.per_frame):
        with pytest.raises(Unavailable, match="x cannot run here: no weights"):
            call(made(1, 16, 16))


def test_the_number_of_inputs_is_checked():
    with pytest.raises(TypeError, match="PSNR takes video, reference; got 1"):
        METRICS["psnr"](made(1, 16, 16))


def test_a_metric_of_the_whole_video_has_one_value_a_frame_would_have():
    metric = Metric("x", compute=lambda video: video.float().mean().item(), takes=ALONE)
    video = made(2, 16, 16)
    assert metric.per_frame(video).tolist() == pytest.approx([metric(video)])


@pytest.mark.parametrize("name", PAIRED)
def test_equal_videos_are_best_and_noise_is_worse(name, device):
    metric, video = runnable(name), made(2, 176, 192).to(device)
    best = metric(video, video)
    assert best == pytest.approx(BEST.get(name, 0), abs=3 if name == "vmaf" else 1e-6)
    values = [best]
    for deviation in (4, 40):
        torch.manual_seed(1)
        values.append(metric(noisy(video.cpu(), deviation).to(device), video))
    assert values == sorted(values, reverse=metric.higher_is_better)
    assert len(set(values)) == 3


@pytest.mark.parametrize("name", [*PAIRED, *OF_ONE])
def test_values_are_those_of_the_frames_and_of_eight_bits(name, device):
    metric = runnable(name)
    clips = [made(3, 192, 192).to(device) for _ in metric.takes]
    values = metric.per_frame(*clips)
    assert values.dtype == torch.float64 and values.ndim == 1 and values.device.type == "cpu"
    assert len(values) in (1, 2, 3) and values.isfinite().all()
    assert metric(*clips) == pytest.approx(values.mean().item())
    almost = [(clip.float() / 255 + 0.2 / 255).clamp(max=1) for clip in clips]
    assert metric(*almost) == pytest.approx(metric(*clips), rel=1e-12)


@pytest.mark.parametrize("name", [*PAIRED, *OF_ONE])
@pytest.mark.parametrize(
    ("shape", "value", "message"),
    [
        ((3, 192, 192), 0.5, r"\[T, C, H, W\]"),
        ((0, 3, 192, 192), 0.5, "not empty"),
        ((3, 3, 192, 192), 1.5, r"\[0, 1\].*1\.5"),
        ((3, 3, 192, 192), math.nan, r"\[0, 1\]"),
    ],
    ids=["no video", "empty", "out of range", "nan"],
)
def test_wrong_inputs_are_named(name, shape, value, message):
    metric = runnable(name)
    with pytest.raises(ValueError, match=message):
        metric(*[torch.full(shape, value)] * len(metric.takes))


@pytest.mark.parametrize("name", PAIRED)
def test_videos_of_two_sizes_are_refused(name):
    metric = runnable(name)
    with pytest.raises(ValueError, match=r"\(3, 3, 192, 192\).*\(2, 3, 192, 192\)"):
        metric(made(3, 192, 192), made(2, 192, 192))


SMALL = ["ssim", "ms_ssim", "st_lpips", "vmaf", "xpsnr", "niqe", "dis_motion"]


@pytest.mark.parametrize("name", SMALL)
def test_too_small_frames_are_refused(name):
    metric = runnable(name)
    with pytest.raises(ValueError, match=r"at least.*pixels.*8 x 9"):
        metric(*[made(3, 8, 9)] * len(metric.takes))


def test_the_scored_pair_of_real_clips_ranks_below_a_light_distortion():
    pristine, distorted = real("carphone_pristine", 3), real("carphone_distorted", 3)
    light = noisy(pristine, 2)
    for name in ("psnr", "ssim", "flip", "vmaf", "xpsnr"):
        metric = METRICS[name]
        values = [metric(distorted, pristine), metric(light, pristine)]
        assert values == sorted(values, reverse=not metric.higher_is_better), name


def test_the_documentation_names_every_metric_and_its_direction():
    text = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text()
    text = text.replace("`lpips_alex`, `lpips_vgg`", "`lpips_alex` | lower |\n| `lpips_vgg`")
    for name, metric in METRICS.items():
        better = "higher" if metric.higher_is_better else "lower"
        assert f"| `{name}` | {better} |" in text, name
