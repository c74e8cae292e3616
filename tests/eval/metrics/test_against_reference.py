"""MS-SSIM, FLIP, flicker, motion and latents against second implementations."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from tests.eval.metrics.clips import made, noisy, real
from vdit_sparse.eval.metrics import METRICS
from vdit_sparse.eval.metrics.flip import flip_per_frame
from vdit_sparse.eval.metrics.ms_ssim import EXPONENTS, ms_ssim_per_frame


def valid(image, kernel):
    """Every place of a two-dimensional kernel in `[H, W]`, by numpy's windows."""
    windows = np.lib.stride_tricks.sliding_window_view(image, kernel.shape)
    return np.einsum("yxij,ij->yx", windows, kernel)


def ms_ssim_by_hand(x, y):
    place = np.arange(-5, 6)
    bell = np.exp(-(place**2) / (2 * 1.5**2))
    kernel = np.outer(bell, bell) / bell.sum() ** 2
    result = 1.0
    for scale, exponent in enumerate(EXPONENTS):
        means = []
        for a, b in zip(x, y, strict=True):
            ma, mb = valid(a, kernel), valid(b, kernel)
            va, vb = valid(a * a, kernel) - ma**2, valid(b * b, kernel) - mb**2
            structure = (2 * (valid(a * b, kernel) - ma * mb) + 58.5225) / (va + vb + 58.5225)
            light = (2 * ma * mb + 6.5025) / (ma**2 + mb**2 + 6.5025)
            means.append((structure * light if scale == 4 else structure).mean())
        result *= np.mean(means) ** exponent
        x, y = (
            (v[:, 0::2, 0::2] + v[:, 1::2, 0::2] + v[:, 0::2, 1::2] + v[:, 1::2, 1::2]) / 4
            for v in (v[:, : v.shape[1] // 2 * 2, : v.shape[2] // 2 * 2] for v in (x, y))
        )
    return result


@pytest.mark.parametrize("size", [(176, 176), (179, 190)], ids=str)
def test_ms_ssim_is_its_definition(size):
    reference = made(1, *size)
    video = noisy(reference, 15)
    expected = ms_ssim_by_hand(*(v[0].double().numpy() for v in (video, reference)))
    assert ms_ssim_per_frame(video, reference).tolist() == pytest.approx([expected], abs=1e-12)


def test_ms_ssim_is_nearly_that_of_torchmetrics():
    reference = made(2, 192, 224)
    video = noisy(reference, 25)
    expected = multiscale_structural_similarity_index_measure(
        video.double(), reference.double(), data_range=255.0
    )
    # torchmetrics counts the border at the last scale, we do not.
    assert METRICS["ms_ssim"](video, reference) == pytest.approx(expected.item(), abs=5e-3)


def test_opposite_frames_have_no_likeness():
    video = (torch.rand(1, 1, 176, 176) > 0.5).byte() * 255
    assert ms_ssim_per_frame(video, 255 - video).tolist() == [0.0]


FLIP_CASES = {"carphone": 0.203726, "green against blue": 0.695325}


def flip_pair(case):
    if case == "carphone":
        return real("carphone_distorted", 1), real("carphone_pristine", 1)
    video = torch.zeros(1, 3, 40, 33, dtype=torch.uint8)
    reference = video.clone()
    video[:, 1, :, :16], reference[:, 2, :, :20] = 255, 255
    return video, reference


@pytest.mark.parametrize("case", FLIP_CASES)
def test_flip_is_that_of_its_authors(case):
    video, reference = flip_pair(case)
    found = flip_per_frame(video, reference).item()
    # Recorded from NVIDIA's flip-evaluator 1.7; compared with it directly where it is installed.
    assert found == pytest.approx(FLIP_CASES[case], abs=2e-4)


@pytest.mark.parametrize("case", [*FLIP_CASES, "noise"])
def test_flip_is_that_of_the_installed_evaluator(case):
    evaluator = pytest.importorskip("flip_evaluator")
    pair = (made(1, 48, 64), noisy(made(1, 48, 64), 20)) if case == "noise" else flip_pair(case)
    images = [(x[0].permute(1, 2, 0).float() / 255).contiguous().numpy() for x in pair]
    expected = evaluator.evaluate(images[1], images[0], "LDR", applyMagma=False)[1]
    assert flip_per_frame(*pair).item() == pytest.approx(expected, abs=2e-4)


def test_flicker_is_vbenchs_to_a_millionth():
    cv2 = pytest.importorskip("cv2")
    frames = real("bikes", 6).permute(0, 2, 3, 1).numpy()[..., ::-1]  # VBench reads BGR
    errors = [np.mean(cv2.absdiff(a, b)) for a, b in zip(frames[:-1], frames[1:], strict=True)]
    expected = (255.0 - np.mean(errors).item()) / 255.0
    metric = METRICS["temporal_flickering"]
    assert metric(real("bikes", 6)) == pytest.approx(expected, abs=1e-9)
    assert metric(real("bikes", 1).expand(3, -1, -1, -1)) == 1


def test_a_constant_error_neither_flickers_nor_moves():
    reference = made(4, 24, 32).clamp(max=200)
    for name in ("flicker_difference", "motion_difference"):
        assert METRICS[name](reference + 50, reference) == 0


def test_differences_of_flicker_and_motion_by_hand():
    still = torch.full((3, 1, 4, 4), 100, dtype=torch.uint8)
    jumpy = still.clone()
    jumpy[1, :, :2] += 40  # half of the pixels, there and back
    flicker = METRICS["flicker_difference"].per_frame(jumpy, still)
    assert flicker.tolist() == pytest.approx([20 / 255, 20 / 255])
    assert METRICS["motion_difference"].per_frame(jumpy, still).tolist() == [20, 20]
    opposite = still.clone()
    opposite[1, :, 2:] += 40  # as much flicker as `jumpy`, elsewhere
    assert METRICS["flicker_difference"](opposite, jumpy) == 0
    assert METRICS["motion_difference"](opposite, jumpy) == 40


@pytest.mark.parametrize("name", ["temporal_flickering", "rife_smoothness", "dis_motion"])
def test_a_still_has_no_motion(name):
    metric = METRICS[name]
    if metric.unavailable() is None:
        with pytest.raises(ValueError, match="at least t"):
            metric(made(1, 48, 48))


def test_latent_error_is_the_ratio_of_norms():
    reference = torch.randn(16, 5, 6, 8)
    latents = reference + 0.1 * torch.randn(16, 5, 6, 8)
    metric = METRICS["latent_error"]
    x, y = latents.double().numpy(), reference.double().numpy()
    expected = [np.linalg.norm(x[:, t] - y[:, t]) / np.linalg.norm(y[:, t]) for t in range(5)]
    assert metric.per_frame(latents, reference).tolist() == pytest.approx(expected)
    assert metric(latents, reference) == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(y))
    assert metric(reference, reference) == 0
    nothing = torch.zeros(1, 2, 2, 2)
    assert metric(nothing, nothing) == 0 and metric(nothing + 1, nothing) == math.inf


@pytest.mark.parametrize(
    ("latents", "reference", "message"),
    [
        (torch.zeros(1, 16, 5, 6, 8), torch.zeros(1, 16, 5, 6, 8), "one sample at a time"),
        (torch.zeros(16, 5, 6, 8), torch.zeros(16, 4, 6, 8), r"\(16, 5, 6, 8\).*\(16, 4, 6, 8\)"),
        (torch.full((1, 1, 2, 2), math.nan), torch.zeros(1, 1, 2, 2), "not finite"),
        (torch.zeros(1, 1, 2, 2).int(), torch.zeros(1, 1, 2, 2).int(), "floating-point"),
    ],
    ids=["batch", "shapes", "nan", "integers"],
)
def test_wrong_latents_are_named(latents, reference, message):
    with pytest.raises(ValueError, match=message):
        METRICS["latent_error"](latents, reference)
