"""The captions of the procedural videos: every word is true of the spec, and the prompts fit."""

import numpy as np
import pytest

from vdit_sparse.pipelines.mini.training.captions import (
    EXAMPLES,
    Item,
    Spec,
    phrasings,
    sample_spec,
    subject,
)
from vdit_sparse.pipelines.mini.training.vocabulary import (
    CAMERAS,
    COLOURS,
    MOTIONS,
    PLACES,
    SPRITE_FOLDER,
    TINTABLE,
    every_name,
    has_colours,
    things,
)

FIXED_PROMPTS = {
    "a red balloon rises up over a green meadow at sunset": Spec(
        "meadow", (Item("balloon", "red", 1, "up"),), "sunset"
    ),
    "a rocket moves in a circle deep in blue water": Spec(
        "underwater", (Item("rocket", motion="circle"),)
    ),
    "a fox walks to the right in the forest": Spec("forest", (Item("fox", motion="right"),), "day"),
    "two blue cars drive left in a city at night": Spec(
        "city", (Item("car", "blue", 2, "left"),), "night"
    ),
    "a penguin bounces in front of snowy mountains while snow falls": Spec(
        "mountains", (Item("penguin", motion="bounce"),), "day", "snow"
    ),
    "a yellow fish swims left deep in blue water, the camera pans right": Spec(
        "underwater", (Item("fish", "yellow", 1, "left"),), camera="pan right"
    ),
    "a ufo moves from left to right over a neon grid": Spec(
        "neon grid", (Item("ufo", motion="right"),)
    ),
    "a pink cube rotates in place in a photo studio": Spec(
        "studio", (Item("cube", "pink", 1, "spin"),)
    ),
}


def draw(count: int, seed: int = 0) -> list[Spec]:
    rng = np.random.default_rng(seed)
    return [sample_spec(rng) for _ in range(count)]


@pytest.mark.parametrize("prompt", FIXED_PROMPTS)
def test_the_fixed_prompts_are_captions_of_the_grammar(prompt):
    assert prompt in set(phrasings(FIXED_PROMPTS[prompt]))


def test_sampling_is_deterministic_and_varied():
    assert draw(20, seed=3) == draw(20, seed=3)
    assert draw(20, seed=3) != draw(20, seed=4)
    assert len({spec.caption for spec in draw(300)}) > 290


def test_every_caption_is_a_phrasing_of_its_spec():
    for spec in draw(100):
        assert spec.caption in set(phrasings(spec))


def test_caption_words_match_the_spec():
    for spec in draw(500):
        words = set(spec.caption.replace(",", "").split())
        assert any(phrase in spec.caption for phrase in PLACES[spec.place].phrases)
        for item in spec.items:
            assert subject(item) in spec.caption
        assert ("night" in spec.caption) == (spec.time == "night")
        assert ("sunset" in spec.caption or "evening" in spec.caption) == (spec.time == "sunset")
        assert bool({"rain", "rains"} & words) == (spec.weather == "rain")
        for camera in set(CAMERAS) - {"static"}:
            said = any(phrase in spec.caption for phrase in CAMERAS[camera])
            assert said == (spec.camera == camera)


def test_no_phrasing_belongs_to_two_motions():
    seen = {}
    for motion in MOTIONS:
        for caption in phrasings(Spec("room", (Item("dog", motion=motion),))):
            assert seen.setdefault(caption, motion) == motion


def test_captions_of_other_sides_share_no_phrase():
    for name in every_name():
        colour = "red" if has_colours(name) else ""
        left, right = (
            set(phrasings(Spec("meadow", (Item(name, colour, 1, side),), "day")))
            for side in ("left", "right")
        )
        assert left and right and not left & right


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (Item("ufo"), "a ufo"),
        (Item("umbrella", "orange"), "an orange umbrella"),
        (Item("octopus", count=2), "two octopuses"),
        (Item("butterfly", "red", 3), "three red butterflies"),
        (Item("grapes"), "a bunch of grapes"),
    ],
)
def test_subjects_are_english(item, words):
    assert subject(item) == words


def test_verbs_agree_in_number_and_fit_the_place():
    flying = set(phrasings(Spec("space", (Item("bee", count=2, motion="left"),))))
    assert "two bees fly to the left in space" in flying
    assert not any("flies" in caption for caption in flying)
    walking = set(phrasings(Spec("forest", (Item("fox", motion="left"),), "day")))
    assert "a fox walks left in the forest" in walking
    swimming = set(phrasings(Spec("forest", (Item("fish", "red", 1, "left"),), "day")))
    assert not any("swim" in caption for caption in swimming)


def test_shares_favour_single_things():
    specs = draw(2000)
    single = sum(sum(item.count for item in spec.items) == 1 for spec in specs) / len(specs)
    assert 0.68 < single < 0.80
    assert {item.motion for spec in specs for item in spec.items} == set(MOTIONS)
    assert {spec.place for spec in specs} == set(PLACES)


def test_the_vocabulary_names_existing_sprites():
    known = things()
    assert len(every_name()) == 100
    assert set(TINTABLE) <= set(known)
    for thing in known.values():
        assert thing.faces in ("left", "right", "front")
        assert thing.file is None or (SPRITE_FOLDER / thing.file).is_file()
    assert (SPRITE_FOLDER / "LICENSE").read_text().count("MIT License") == 2


def test_the_whole_vocabulary_is_sampled():
    names = {item.name for spec in draw(1500) for item in spec.items}
    assert len(names) > 90


def test_examples_use_only_words_of_the_grammar():
    words = {word for spec in draw(4000) for word in spec.caption.replace(",", "").split()}
    assert len(EXAMPLES) == 12
    for prompt in EXAMPLES:
        assert set(prompt.replace(",", "").split()) <= words
    assert any(colour in prompt for prompt in EXAMPLES for colour in COLOURS)


@pytest.mark.parametrize(
    "wrong",
    [
        {"place": "kitchen"},
        {"time": "night"},
        {"camera": "roll"},
        {"items": (Item("dog", "red"),)},
        {"items": (Item("cube"),)},
        {"items": (Item("dragon"),)},
        {"items": (Item("dog", count=9),)},
    ],
)
def test_a_wrong_spec_says_what_can_be_chosen(wrong):
    with pytest.raises(ValueError, match="choose one of"):
        Spec(**{"place": "studio", "items": (Item("dog"),)} | wrong)
