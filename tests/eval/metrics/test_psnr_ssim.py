"""PSNR and SSIM against torchmetrics, an implementation of other people."""

import math

import pytest
import torch
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from vdit_sparse.eval.metrics import QUICK_METRICS, psnr, psnr_per_frame, ssim, ssim_per_frame

SHAPES = [(3, 3, 40, 56), (1, 1, 11, 11), (2, 3, 17, 64)]


def pair(shape, noise=20.0):
    """A smooth random video and a noisy copy of it, uint8."""
    coarse = torch.rand(shape[0], shape[1], 4, 4) * 255
    reference = torch.nn.functional.interpolate(coarse, shape[-2:], mode="bilinear")
    video = reference + noise * torch.randn(shape)
    return [x.round().clamp(0, 255).to(torch.uint8) for x in (video, reference)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("noise", [1.0, 20.0, 90.0])
def test_psnr_is_that_of_torchmetrics(shape, noise):
    video, reference = pair(shape, noise)
    expected = [
        peak_signal_noise_ratio(x.double(), y.double(), data_range=255.0)
        for x, y in zip(video, reference, strict=True)
    ]
    torch.testing.assert_close(psnr_per_frame(video, reference), torch.stack(expected).double())
    assert psnr(video, reference) == pytest.approx(torch.stack(expected).mean().item())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("noise", [1.0, 20.0, 90.0])
def test_ssim_is_that_of_torchmetrics(shape, noise):
    video, reference = pair(shape, noise)
    _, places = structural_similarity_index_measure(
        video.double(), reference.double(), data_range=255.0, return_full_image=True
    )
    # torchmetrics averages over the border too, where it reflects the image; we do not.
    expected = places[..., 5:-5, 5:-5].flatten(1).mean(1)
    torch.testing.assert_close(ssim_per_frame(video, reference), expected, atol=1e-9, rtol=1e-9)
    assert ssim(video, reference) == pytest.approx(expected.mean().item())


def test_psnr_by_hand():
    reference = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    video = reference.clone()
    video[1] += 5
    assert psnr_per_frame(video, reference).tolist() == [100.0, 20 * math.log10(255 / 5)]


@pytest.mark.parametrize(("name", "best"), [("psnr", 100.0), ("ssim", 1.0)])
def test_an_equal_video_is_the_best_one(name, best):
    video, _ = pair((2, 3, 16, 16))
    assert QUICK_METRICS[name](video, video) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("name", QUICK_METRICS)
def test_more_noise_is_worse(name):
    values = []
    for noise in (2.0, 10.0, 50.0):
        torch.manual_seed(1)
        values.append(QUICK_METRICS[name](*pair((2, 3, 32, 32), noise)))
    assert values == sorted(values, reverse=QUICK_METRICS[name].higher_is_better)
    assert len(set(values)) == 3


@pytest.mark.parametrize("name", QUICK_METRICS)
def test_float_frames_are_rounded_to_eight_bits(name):
    video, reference = pair((2, 3, 16, 24))
    floats = [x.float() / 255 for x in (video, reference)]
    almost = (floats[0] + 0.3 / 255).clamp(max=1)
    expected = QUICK_METRICS[name](video, reference)
    assert QUICK_METRICS[name](*floats) == expected
    assert QUICK_METRICS[name](almost, floats[1]) == expected


@pytest.mark.parametrize("name", QUICK_METRICS)
@pytest.mark.parametrize(
    ("video", "reference", "message"),
    [
        (torch.zeros(2, 3, 16, 16), torch.zeros(1, 3, 16, 16), r"\(2, 3, 16, 16\).*\(1, 3, 16"),
        (torch.zeros(3, 16, 16), torch.zeros(3, 16, 16), r"\[T, C, H, W\]"),
        (torch.zeros(0, 3, 16, 16), torch.zeros(0, 3, 16, 16), "not empty"),
        (torch.full((1, 3, 16, 16), 1.5), torch.zeros(1, 3, 16, 16), r"\[0, 1\].*1\.5"),
        (torch.full((1, 3, 16, 16), math.nan), torch.zeros(1, 3, 16, 16), r"\[0, 1\]"),
        (torch.zeros(1, 3, 16, 16).int(), torch.zeros(1, 3, 16, 16).int(), "uint8"),
    ],
    ids=["shapes", "no video", "empty", "out of range", "nan", "integers"],
)
def test_wrong_inputs_are_named(name, video, reference, message):
    with pytest.raises(ValueError, match=message):
        QUICK_METRICS[name](video, reference)


def test_ssim_needs_room_for_its_window():
    small = torch.zeros(1, 3, 10, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="11 x 11 pixels, got 10 x 16"):
        ssim(small, small)
