"""The judge's labels, how answers are counted, and that it trains, saves and loads."""

import json

import pytest
import torch
from safetensors.torch import load_file

from vdit_sparse.pipelines.mini.training import train
from vdit_sparse.pipelines.mini.training.captions import Item, Spec
from vdit_sparse.pipelines.mini.training.checkpoints import Checkpoints
from vdit_sparse.pipelines.mini.training.clips import Limit
from vdit_sparse.pipelines.mini.training.judge import (
    JUDGES,
    JudgeNetwork,
    load_network,
    resample,
    save_judge,
)
from vdit_sparse.pipelines.mini.training.judge_data import augment, fill_pool, targets
from vdit_sparse.pipelines.mini.training.judge_labels import ROWS, classes, labels, score
from vdit_sparse.pipelines.mini.training.judge_training import JudgeSettings, judge_loss, measure
from vdit_sparse.pipelines.mini.training.models import TINY, build_autoencoder
from vdit_sparse.pipelines.mini.training.pacing import Optimizers
from vdit_sparse.pipelines.mini.training.whole_clip import WholeClip

SPEC = Spec(
    "meadow",
    (Item("car", "blue", 2, "left"),),
    time="sunset",
    weather="rain",
    camera="pan left",
)
PAIR = Spec("space", (Item("ufo", motion="up"), Item("dog", motion="spin")))


@pytest.fixture(scope="module")
def pool():
    return fill_pool((16, 28, 8), "cpu", Limit(12), seed=3)


def test_labels_say_what_a_spec_says():
    assert labels(SPEC) == {
        "object 1": "car",
        "colour 1": "blue",
        "count 1": "2",
        "motion 1": "left",
        "object 2": "none",
        "colour 2": "none",
        "count 2": "none",
        "motion 2": "none",
        "place": "meadow",
        "time": "sunset",
        "weather": "rain",
        "camera": "pan left",
    }


def test_two_things_have_one_order_whichever_the_caption_names_first():
    turned = Spec("space", PAIR.items[::-1])
    assert labels(PAIR) == labels(turned)
    found = labels(PAIR)
    assert (found["object 1"], found["colour 1"], found["motion 1"]) == ("dog", "own", "spin")
    assert (found["object 2"], found["motion 2"]) == ("ufo", "up")
    assert (found["time"], found["weather"], found["camera"]) == ("none", "none", "static")


def test_every_label_is_a_class(pool):
    names = classes()
    for spec, row in zip(pool.specs, pool.answers.tolist(), strict=True):
        found = {head: names[head][index] for head, index in zip(names, row, strict=True)}
        assert found == labels(spec)


def test_three_kinds_of_things_are_refused():
    items = (Item("dog"), Item("cat"), Item("ufo"))
    with pytest.raises(ValueError, match="at most 2 kinds of things in a clip, got 3"):
        labels(Spec("space", items))


def test_right_answers_score_one_and_only_what_was_asked_counts():
    truths = [labels(SPEC), labels(PAIR)]
    found = score(truths, truths)
    asked = {row: each.asked for row, each in found.items()}
    assert all(each.right == each.asked for each in found.values())
    assert asked == {
        "place": 2,
        "time": 1,
        "weather": 2,
        "camera": 2,
        "static camera": 1,
        "moving camera": 1,
        "object": 3,
        "colour": 1,
        "count": 3,
        "two or three": 1,
        "motion": 3,
        "direction": 2,
    }
    assert set(asked) == set(ROWS)


def test_answers_about_two_things_may_be_exchanged_but_not_mixed():
    truth = labels(PAIR)
    kinds = ("object", "colour", "count", "motion")
    turned = truth | {f"{kind} 1": truth[f"{kind} 2"] for kind in kinds}
    turned |= {f"{kind} 2": truth[f"{kind} 1"] for kind in kinds}
    assert score([turned], [truth])["object"].right == 2
    mixed = truth | {"motion 1": truth["motion 2"], "motion 2": truth["motion 1"]}
    found = score([mixed], [truth])
    assert (found["object"].right, found["motion"].right) == (2, 0)


def test_the_released_judge_fits_one_and_a_half_megabytes():
    with torch.device("meta"):
        network = JudgeNetwork(JUDGES["released"])
    assert 1.2e6 < sum(p.numel() for p in network.parameters()) < 1.43e6  # a byte each, 60 kB more


def test_resampling_takes_the_nearest_frames_and_keeps_means():
    video = torch.arange(25.0).view(1, 1, -1, 1, 1).expand(1, 3, 25, 128, 224)
    small = resample(video)
    assert small.shape == (1, 3, 8, 64, 112)
    assert small[0, 0, :, 5, 5].round(decimals=4).tolist() == [0, 3, 7, 10, 14, 17, 21, 24]
    fine = torch.rand(1, 3, 8, 128, 224)
    torch.testing.assert_close(resample(fine).mean(), fine.mean(), atol=1e-3, rtol=0)
    same = torch.rand(1, 3, 8, 64, 112)
    assert torch.equal(resample(same), same)


def test_augmented_clips_keep_their_range_and_look_alike(pool):
    clips, _ = pool.draw(6)
    changed = augment(clips)
    assert changed.shape == clips.shape
    assert changed.abs().max() <= 1
    apart = (changed - clips).abs().mean()
    assert 0.01 < apart < 0.25
    # One shift for all frames: a still picture stays still but for the noise.
    still = clips[:, :, :1].expand_as(clips)
    assert augment(still).diff(dim=2).abs().mean() < 0.05


def test_clips_may_go_through_the_autoencoder():
    vae = build_autoencoder(TINY).requires_grad_(False)
    plain, coded = (
        fill_pool((32, 64, 5), "cpu", Limit(2), 3, coder) for coder in (None, WholeClip(vae))
    )
    assert plain.specs == coded.specs
    assert torch.equal(plain.answers, coded.answers)
    assert plain.clips.shape == coded.clips.shape == (2, 3, 8, 64, 112)
    assert not torch.equal(plain.clips, coded.clips)


def test_the_loss_falls(pool, device):
    network = JudgeNetwork(JUDGES["tiny"]).to(device)
    matrices = network.matrices()
    chosen = {id(p) for p in matrices}
    others = [p for p in network.parameters() if id(p) not in chosen]
    optimizers = Optimizers(matrices, others)
    clips, answers = pool.clips[:6].to(device).float() / 127.5 - 1, pool.answers[:6].to(device)
    losses = []
    for _ in range(12):
        loss = judge_loss(network, clips, answers, 0.05)
        optimizers.step(loss, 1.0)
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]


def test_a_saved_judge_answers_as_before(tmp_path):
    network = JudgeNetwork(JUDGES["tiny"]).eval()
    facts = {"held_out": {"clips": 3}}
    save_judge(network, tmp_path / "judge", facts)
    loaded, _ = load_network(tmp_path / "judge")
    clips = torch.rand(1, 3, 8, 64, 112) * 2 - 1
    stored = load_file(tmp_path / "judge" / "judge.safetensors")
    assert stored["readers.0.wide.weight"].dtype == torch.int8
    for name, tensor in network.state_dict().items():
        eight_bits = stored[name].dtype == torch.int8
        bound = tensor.abs().max() / (250 if eight_bits else 256)
        assert (loaded.state_dict()[name] - tensor).abs().max() <= bound
    # What was rounded once stays as it is.
    size = save_judge(loaded, tmp_path / "judge", facts)
    again, config = load_network(tmp_path / "judge")
    for found, expected in zip(again(clips).values(), loaded(clips).values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert config["held_out"] == facts["held_out"]
    assert loaded.names == classes()
    assert size == sum(file.stat().st_size for file in (tmp_path / "judge").iterdir())


def test_a_missing_judge_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="train judge"):
        load_network(tmp_path)


def test_the_stage_trains_with_and_without_the_autoencoder(tmp_path):
    vae = build_autoencoder(TINY)
    statistics = {"mean": torch.zeros(8), "std": torch.ones(8), "step": 0}
    weights = {"weights": vae.state_dict(), "average": vae.state_dict()}
    Checkpoints(tmp_path).save("autoencoder", weights | statistics)
    common = ["--folder", str(tmp_path), "--sizes", "tiny", "--device", "cpu", "--batch", "2"]
    common += ["--height", "32", "--width", "64", "--frames", "5", "--clips", "4"]
    common += ["--seconds", "0.1", "--held-out", "3", "--held-out-scale", "1"]
    plain = [*common, "--autoencoded-share", "0", "--output", str(tmp_path / "plain")]
    train.main(["judge", *common, "then", "judge", *plain])
    for folder, kinds in (("judge", {"renders", "autoencoded"}), ("plain", {"renders"})):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert kinds | {"clips", "static", "moving"} == set(config["held_out"])
        assert 0 <= config["held_out"]["renders"]["place"] <= 1
        assert config["trained"]["steps"] >= 1


def test_a_share_of_one_is_refused():
    with pytest.raises(ValueError, match="autoencoded_share in \\[0, 1\\), got 1"):
        JudgeSettings(autoencoded_share=1)


def test_measuring_counts_the_pool(pool):
    network = JudgeNetwork(JUDGES["tiny"]).eval()
    found = measure(network, pool)
    assert found["place"].asked == len(pool.specs)
    assert targets(list(pool.specs)).equal(pool.answers)
