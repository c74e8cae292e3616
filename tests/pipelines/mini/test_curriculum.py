"""What the denoiser trains on: stages, kinds of batches, phrasings, kept latents, long clips."""

import random
import shlex
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.pipelines.mini.toys import SHAPE, randomise
from vdit_sparse.pipelines.mini.training import train
from vdit_sparse.pipelines.mini.training.batches import Batches, LatentLibrary
from vdit_sparse.pipelines.mini.training.captions import MOTION_SHARES, phrasings, sample_spec
from vdit_sparse.pipelines.mini.training.checkpoints import TOKENIZER, Checkpoints, load_tokenizer
from vdit_sparse.pipelines.mini.training.clips import ClipShape, Limit, render_specs
from vdit_sparse.pipelines.mini.training.curriculum import DenoiserSettings, parse_stages
from vdit_sparse.pipelines.mini.training.latents import LatentSet, Phrases, several_captions
from vdit_sparse.pipelines.mini.training.models import TINY, build_autoencoder
from vdit_sparse.pipelines.mini.training.tracks import tracks

SETTINGS = DenoiserSettings(clips=3, long_clips=2, stills=2, phrasings=2, batch=4, seconds=7.0)


@pytest.fixture
def checkpoints(tmp_path):
    save_autoencoder(Checkpoints(tmp_path), 1.0)
    return Checkpoints(tmp_path)


def save_autoencoder(checkpoints, deviation):
    weights = randomise(build_autoencoder(TINY)).state_dict()
    statistics = {"mean": torch.zeros(8), "std": torch.full((8,), deviation)}
    checkpoints.save("autoencoder", {"average": weights, **statistics})


def test_stages_replace_options_for_themselves_alone():
    text = "128x224 seconds=20 image-frames=1,3 / 256x448x49 batch=3 keep_latents=1"
    first, second = parse_stages(SHAPE, replace(SETTINGS, stages=text))
    assert first[0] == ClipShape(128, 224, SHAPE.frames, SHAPE.device)
    assert (first[1].seconds, first[1].batch, first[1].frame_counts()) == (20.0, 4, [1, 3])
    assert second[0] == ClipShape(256, 448, 49, SHAPE.device)
    assert (second[1].seconds, second[1].batch, second[1].keep_latents) == (7.0, 3, True)
    assert parse_stages(SHAPE, SETTINGS) == [(SHAPE, SETTINGS)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("128", "a size like 256x448"),
        ("128x224 color=1", "expected one of .* got 'color=1'"),
        ("128x224 rate=1", "got 'rate=1'"),
        ("128x224 / ", "both sides of every '/'"),
        ("100x224", "divisible by 16"),
        ("128x224 images=2", "images from 0 to 1"),
    ],
)
def test_a_wrong_stage_says_what_is_expected(text, message):
    with pytest.raises(ValueError, match=message):
        parse_stages(SHAPE, replace(SETTINGS, stages=text))


def test_phrasings_say_the_same_and_differ():
    spec = sample_spec(np.random.default_rng(3))
    texts = several_captions(spec, 8)
    assert texts[0] == spec.caption
    assert len(set(texts)) > 3
    assert set(texts) <= set(phrasings(spec))
    assert texts == several_captions(spec, 8)


def test_the_table_of_words_gives_the_tokenizers_tokens():
    tokenizer, dice = load_tokenizer(TOKENIZER), np.random.default_rng(0)
    texts = [sample_spec(dice).caption for _ in range(300)] + ["", "A ünknown word, " * 30]
    expected = tokenizer(
        texts, padding="max_length", max_length=64, truncation=True, return_tensors="pt"
    ).input_ids
    assert torch.equal(Phrases(tokenizer)(texts), expected)


def test_drawn_tokens_belong_to_the_drawn_clip():
    latents = torch.arange(5.0).view(5, 1, 1, 1, 1).expand(5, 2, 3, 4, 4).half()
    tokens = torch.arange(5).view(5, 1, 1) * 10 + torch.arange(3).view(1, 3, 1)
    data = LatentSet(latents, tokens.expand(5, 3, 64), torch.full((64,), 99))
    found, text = data.draw(200, 0.2, frames=2)
    assert found.shape == (200, 2, 2, 4, 4) and found.dtype == torch.float32
    kept = text[:, 0] != 99
    assert 100 < kept.sum() < 195
    assert torch.equal(text[kept, 0] // 10, found[kept, 0, 0, 0, 0].long())
    assert set((text[kept, 0] % 10).tolist()) == {0, 1, 2}


def test_kinds_of_batches_have_equal_tokens_and_shrinking_shares(checkpoints):
    library = LatentLibrary(checkpoints, TINY, "cpu")
    settings = replace(SETTINGS, image_frames="1,2", images=0.8, images_end=0.2, long_share=0.5)
    batches = Batches(library, SHAPE, settings)
    assert [kind.shape for kind in batches.kinds()] == [
        (4, 8, 2, 4, 8),
        (1, 8, 3, 4, 8),
        (8, 8, 1, 4, 8),
        (4, 8, 2, 4, 8),
    ]
    assert len(batches.images[0].sets) == 2 and len(batches.images[1].sets) == 1
    for fraction, share in ((0.0, 0.8), (1.0, 0.2)):
        dice = random.Random(0)
        drawn = [batches.choose(dice, fraction) for _ in range(500)]
        images = sum(kind in batches.images for kind in drawn)
        assert images / 500 == pytest.approx(share, abs=0.06)
        longs = sum(kind is batches.long for kind in drawn)
        assert longs / (500 - images) == pytest.approx(0.5, abs=0.12)
    drawn = batches.images[0].draw(random.Random(0))
    only = Batches(library, SHAPE, replace(settings, images=1.0, images_end=1.0))
    assert only.kinds() == only.images
    assert (drawn.shift, drawn.pad_length) == (settings.image_shift, 64)
    assert drawn.tokens.shape == (8, 64)


def test_a_stage_of_single_frames_needs_no_long_clips(checkpoints):
    library = LatentLibrary(checkpoints, TINY, "cpu")
    still = ClipShape(32, 64, 1, "cpu")
    batches = Batches(library, still, replace(SETTINGS, images=0, images_end=0))
    assert [kind.shape for kind in batches.kinds()] == [(4, 8, 1, 4, 8)]
    with pytest.raises(ValueError, match="image_frames from 1 to 2, got 3"):
        Batches(library, SHAPE, replace(SETTINGS, image_frames="3"))


def test_kept_latents_are_read_completed_and_bound_to_their_autoencoder(checkpoints):
    keep = replace(SETTINGS, keep_latents=True)
    first = LatentLibrary(checkpoints, TINY, "cpu").obtain(SHAPE, Limit(2), keep)
    library = LatentLibrary(checkpoints, TINY, "cpu")
    more = library.obtain(SHAPE, Limit(5), keep)
    assert torch.equal(more.latents[:2], first.latents)
    assert torch.equal(more.tokens[:2], first.tokens)
    assert len(more.latents) == len(more.tokens) == 5
    assert (more.latents[:2, None] != more.latents[None, 2:]).flatten(2).any(-1).all()
    assert library.obtain(SHAPE, Limit(9), keep) is more
    again = LatentLibrary(checkpoints, TINY, "cpu").obtain(SHAPE, Limit(5), keep)
    assert torch.equal(again.latents, more.latents)
    save_autoencoder(checkpoints, 2.0)
    assert len(LatentLibrary(checkpoints, TINY, "cpu").obtain(SHAPE, Limit(1), keep).latents) == 1


def test_clips_of_earlier_calls_are_not_rendered_again(checkpoints):
    first, other = (
        LatentLibrary(checkpoints, TINY, "cpu").obtain(SHAPE, Limit(2), settings).latents
        for settings in (SETTINGS, replace(SETTINGS, earlier_calls=2))
    )
    assert (first[:, None] != other[None]).flatten(2).any(-1).all()


@pytest.mark.parametrize("motion", sorted(MOTION_SHARES))
def test_a_long_clip_is_one_motion_at_half_the_speed(motion):
    spec = sample_spec(np.random.default_rng(5))
    spec = replace(spec, items=(replace(spec.items[0], motion=motion),))
    for short, long in zip(tracks(spec, 25, 1.75), tracks(spec, 49, 1.75), strict=True):
        for name in ("x", "y", "size"):
            np.testing.assert_allclose(getattr(long, name)[::2], getattr(short, name), atol=1e-9)


def test_rendered_long_clips_pass_through_the_frames_of_short_ones():
    pictures = [
        next(render_specs(ClipShape(32, 64, frames, "cpu"), Limit(3), seed=1))[0]
        for frames in (25, 49)
    ]
    torch.testing.assert_close(pictures[1][:, :, ::2], pictures[0], atol=2e-2, rtol=0)


@pytest.mark.parametrize("recipe, expected", [(2, [335, 365, 500, 400]), (3, [485])])
def test_the_command_lines_of_the_recipes_are_understood(recipe, expected):
    text = (Path(train.__file__).parent / "README.md").read_text()
    section = text.split("**Between the calls")[0].split("## Recipe ")[recipe]
    lines = "".join(section.split("```")[1::2])
    seconds = []
    for line in filter(None, lines.replace("\\\n", " ").splitlines()):
        words = shlex.split(line.split("train ", 1)[1])
        groups = groupby(words, key=lambda word: word == train.JOINT)
        parts = [list(part) for joint, part in groups if not joint]
        options = [train.build_parser().parse_args(part) for part in parts]
        for denoiser in (one for one in options if one.stage == "denoiser"):
            stages = parse_stages(SHAPE, replace(SETTINGS, stages=denoiser.stages))
            seconds.append(sum(stage.seconds for _, stage in stages))
    assert seconds == expected
