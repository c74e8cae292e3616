"""Which metrics are chosen for a suite, and the figures of one clip."""

import pytest
import torch

from vdit_sparse.eval.judge import FOLDER
from vdit_sparse.eval.measure import Chosen, Measure, choose
from vdit_sparse.eval.metrics import METRICS, psnr, ssim
from vdit_sparse.eval.store import Made
from vdit_sparse.eval.suite import IMAGE, Prompt, Suite, read_suite

PLAIN = Suite("plain", (Prompt("a cat"),))
CLIP = torch.randint(0, 255, (3, 3, 24, 24), generator=torch.Generator().manual_seed(0)).byte()


def test_all_that_can_run_is_chosen_and_the_rest_has_a_reason():
    chosen = choose(None, PLAIN)
    assert {"psnr", "ssim"} <= set(chosen.names)
    assert set(chosen.names) | set(chosen.left_out) == set(METRICS)
    for name in chosen.names:
        assert METRICS[name].unavailable() is None
    assert "latent_error" in chosen.names and chosen.judge is None
    assert "does not say what its prompts show" in chosen.left_out["adherence"]


def test_names_choose_and_are_checked():
    assert choose(["ssim", "psnr"], PLAIN) == Chosen(("ssim", "psnr"), {})
    with pytest.raises(ValueError, match="There is no metric 'pnsr'; there are: psnr, ssim"):
        choose(["pnsr"], PLAIN)
    with pytest.raises(ValueError, match="adherence cannot be measured: the suite plain does not"):
        choose(["adherence"], PLAIN)


def test_an_image_has_no_metric_of_time():
    images = Suite("still", (Prompt("a cat"),), IMAGE)
    chosen = choose(None, images)
    of_time = {name for name, metric in METRICS.items() if metric.least_frames > 1}
    assert {"temporal_flickering", "dis_motion", "rife_smoothness"} <= of_time
    assert {"psnr", "ssim"} <= set(chosen.names) and not of_time & set(chosen.names)
    assert chosen.left_out["rife_smoothness"] == "it needs 3 frames, and an image is one."
    with pytest.raises(ValueError, match="temporal_flickering cannot be measured: it needs 2"):
        choose(["psnr", "temporal_flickering"], images)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_says_how_many_frames_it_needs(name):
    metric = METRICS[name]
    if metric.unavailable() or set(metric.takes) - {"video", "reference"}:
        pytest.skip("it cannot run here, or takes more than frames")
    # Large enough for the metrics of many scales.
    frames = torch.randint(0, 255, (3, 3, 192, 192), generator=torch.Generator().manual_seed(0))
    given = {"video": frames.byte(), "reference": frames.flip(-1).byte()}
    least = metric.least_frames
    assert metric(*(given[each][:least] for each in metric.takes)) >= 0
    if least > 1:
        with pytest.raises(ValueError, match="frames"):
            metric(*(given[each][: least - 1] for each in metric.takes))


def test_a_clip_has_its_figures(device):
    measure = Measure(Chosen(("psnr", "ssim", "temporal_flickering"), {}), device)
    other = (CLIP // 2).contiguous()
    row = measure(Made(other, {}), Made(CLIP, {}), PLAIN.prompts[0])
    assert row["metrics"]["psnr"] == pytest.approx(psnr(other, CLIP))
    assert row["metrics"]["ssim"] == pytest.approx(ssim(other, CLIP))
    assert row["unmeasured"] == {} == row["adherence"]
    alone = measure(Made(other, {}), None, PLAIN.prompts[0])
    assert set(alone["metrics"]) == {"temporal_flickering"}


@pytest.mark.parametrize("shape", [(4, 2, 3, 5), (4, 3, 5), (15, 4)])
def test_latents_are_compared_as_the_pipeline_has_them(shape):
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    measure = Measure(Chosen(("latent_error",), {}), torch.device("cpu"))
    dense, other = Made(CLIP, {}, latents), Made(CLIP, {}, 1.25 * latents)
    found = measure(other, dense, PLAIN.prompts[0])
    assert found["metrics"]["latent_error"] == pytest.approx(0.25, abs=1e-6)
    # A pipeline that hands none out has no such value.
    assert measure(Made(CLIP, {}), dense, PLAIN.prompts[0])["metrics"] == {}


def test_what_cannot_be_measured_says_why():
    measure = Measure(Chosen(("psnr", "ssim"), {}), torch.device("cpu"))
    small = Made(CLIP[..., :8, :8], {})
    row = measure(small, small, PLAIN.prompts[0])
    assert row["metrics"] == {"psnr": 100.0}
    assert "at least 11 x 11 pixels" in row["unmeasured"]["ssim"]


def test_a_value_that_is_no_number_is_none(monkeypatch):
    class Broken:
        takes = ("video",)

        def __call__(self, video):
            return float("nan")

    monkeypatch.setitem(METRICS, "broken", Broken())
    row = Measure(Chosen(("broken",), {}), torch.device("cpu"))(
        Made(CLIP, {}), None, PLAIN.prompts[0]
    )
    assert row["metrics"] == {} and row["unmeasured"] == {"broken": "the value is nan"}


def test_adherence_is_counted_where_the_suite_says_what_is_shown():
    suite = read_suite("mini")
    chosen = choose(["psnr"], suite)
    assert (chosen.judge is None) == ("the judge's adherence" in chosen.left_out)
    assert (chosen.judge is None) == (not (FOLDER / "config.json").exists())
    checks = Measure(Chosen(("psnr",), {}), torch.device("cpu"))
    still = CLIP[:1].expand(8, -1, -1, -1).contiguous()
    # One coloured thing that goes to one side: both checks apply, and nothing moves.
    prompt = next(
        each
        for each in suite.prompts
        if len(each.shows.items) == 1
        and each.shows.items[0].motion in ("left", "right", "up", "down")
        and each.shows.items[0].colour
    )
    found = checks(Made(still, {}), None, prompt)["adherence"]
    assert found == {"direction by centroid": [0, 1], "colour by hue": [0, 1]}
