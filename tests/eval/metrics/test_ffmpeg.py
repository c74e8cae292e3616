"""VMAF and XPSNR: what ffmpeg is given, and what it makes of it, by second implementations."""

import math
import subprocess

import numpy as np
import pytest
import torch
from imageio_ffmpeg import get_ffmpeg_exe

from tests.eval.metrics.clips import made, noisy, real
from vdit_sparse.eval.metrics import METRICS, Unavailable
from vdit_sparse.eval.metrics.parts import ffmpeg
from vdit_sparse.eval.metrics.vmaf import vmaf_per_frame
from vdit_sparse.eval.metrics.xpsnr import xpsnr_per_frame


def luma(video):
    """BT.709 luma of limited range, float64 `[T, H, W]`, by ffmpeg's own conversion."""
    frames, _, height, width = video.shape
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-i", "-"]
    convert = ["-vf", "scale=out_color_matrix=bt709:out_range=tv,format=yuv420p"]
    content = video.permute(0, 2, 3, 1).contiguous().numpy().tobytes()
    command = [get_ffmpeg_exe(), "-v", "error", *raw, *convert, "-f", "rawvideo", "-"]
    done = subprocess.run(command, input=content, capture_output=True, check=True)
    planes = np.frombuffer(done.stdout, np.uint8).reshape(frames, -1)
    return planes[:, : height * width].reshape(frames, height, width).astype(np.float64)


def xpsnr_by_hand(video, reference):
    """Helmrich et al. 2020 for frames above 640 x 480, whose weights are not smoothed."""
    frames, height, width = reference.shape
    ratio = height * width / (3840 * 2160)
    side = 4 * int(32 * math.sqrt(ratio) + 0.5)
    overall = math.sqrt(16 * 2 ** (2 * 8 - 9) / math.sqrt(ratio))
    before, values = np.zeros((height, width)), []
    for x, y in zip(video, reference, strict=True):
        around = np.pad(y, 1)
        cross = around[:-2, 1:-1] + around[2:, 1:-1] + around[1:-1, :-2] + around[1:-1, 2:]
        corners = around[:-2, :-2] + around[:-2, 2:] + around[2:, :-2] + around[2:, 2:]
        texture, inside = np.abs(12 * y - 2 * cross - corners), np.zeros((height, width))
        inside[1:-1, 1:-1] = 1
        total = 0.0
        for top in range(0, height, side):
            for left in range(0, width, side):
                block = np.s_[top : top + side, left : left + side]
                activity = (texture * inside)[block].sum() / inside[block].sum()
                activity += 2 * np.abs(y - before)[block].mean()
                total += ((x - y)[block] ** 2).sum() / max(activity, 4)
        values.append(10 * math.log10(height * width * 255**2 / (total * overall)))
        before = y
    return values


def test_xpsnr_is_its_definition():
    reference = noisy(made(2, 484, 660), 6)
    video = noisy(reference, 12)
    expected = xpsnr_by_hand(luma(video), luma(reference))
    assert xpsnr_per_frame(video, reference).tolist() == pytest.approx(expected, abs=2e-3)
    # Which of the two is the original matters: the noisier one would hide more.
    exchanged = xpsnr_by_hand(luma(reference), luma(video))
    assert abs(exchanged[1] - expected[1]) > 0.05


def test_vmaf_is_that_of_vmaf_torch():
    # Recorded from vmaf-torch 1.1.0 on the same four frames; exchanged they would be 50.8, ...
    expected = [39.2193, 39.8628, 39.3871, 41.1952]
    pair = real("carphone_distorted", 4), real("carphone_pristine", 4)
    assert vmaf_per_frame(*pair).tolist() == pytest.approx(expected, abs=0.2)


@pytest.mark.parametrize("name", ["vmaf", "xpsnr"])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 40)], ids=str)
def test_any_size_and_one_frame_have_a_value(name, size):
    values = METRICS[name].per_frame(noisy(made(1, *size), 9), made(1, *size))
    assert values.shape == (1,) and values.isfinite().all()


def test_frames_stay_in_their_order():
    reference = made(3, 64, 64)
    video = reference.clone()
    video[1] = noisy(reference[1], 30)
    assert xpsnr_per_frame(video, reference)[[0, 2]].tolist() == [100, 100]
    assert xpsnr_per_frame(video, reference)[1] < 50


@pytest.mark.parametrize("name", ["vmaf", "xpsnr", "st_lpips", "mobilenet_consistency"])
def test_grey_videos_are_refused_where_colour_is_needed(name):
    metric = METRICS[name]
    if metric.unavailable() is None:
        grey = made(3, 64, 64, channels=1)
        with pytest.raises(ValueError, match=r"RGB frames \[T, 3, H, W\], got \(3, 1, 64, 64\)"):
            metric(*[grey] * len(metric.takes))


def test_a_filter_that_is_not_there_is_named():
    assert "has no filter nosuch" in ffmpeg.filter_missing("nosuch")
    assert ffmpeg.filter_missing("libvmaf") is None


def test_a_failure_of_ffmpeg_is_told():
    video = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(Unavailable, match="ffmpeg failed with code .*"):
        ffmpeg.compared(video, video, "[a][b]nosuch=1", 16)
