"""Stage `phrases`: the order of words counts."""

import copy

import torch
from torch import nn

from tests.pipelines.mini.toys import SHAPE, randomise
from vdit_sparse.pipelines.mini.training import phrases
from vdit_sparse.pipelines.mini.training.checkpoints import TOKENIZER, Checkpoints, load_tokenizer
from vdit_sparse.pipelines.mini.training.models import SIZES, build_text_encoder
from vdit_sparse.pipelines.mini.training.phrases import PhrasesSettings, train_phrases

TOKENS = load_tokenizer(TOKENIZER)


def words(ids):
    return [TOKENS.decode([token]).strip() for token in ids]


def test_a_caption_from_side_to_side_answers_as_the_plain_one():
    caption = "a fox runs from left to right and a cat from right to left, camera panning left"
    tokens, plain, places, camera = phrases._row(TOKENS, caption)
    answers = words([plain[place] for place in places])
    expected = "a fox runs to the the right and a cat to the the left , camera panning left"
    assert answers[:-1] == expected.split()
    assert [w for w, own in zip(words(tokens), camera, strict=True) if own][:-1] == [
        ",", "camera", "panning", "left",
    ]  # fmt: skip


def test_other_captions_answer_as_before():
    caption = "two cats swing from side to side on a plain backdrop"
    tokens, plain, places, camera = phrases._row(TOKENS, caption)
    assert tokens == plain and places == list(range(len(tokens))) and not any(camera)


def test_positions_count_once_the_queries_are_small():
    """Saturated attention does not see them."""
    encoder = randomise(build_text_encoder(SIZES["tiny"]), std=2.0)
    swapped = [
        TOKENS(f"a fox runs from {way}").input_ids for way in ("left to right", "right to left")
    ]
    first, second = (torch.tensor([ids]) for ids in swapped)

    @torch.no_grad()
    def difference():
        """Of the outputs for the same word in two places."""
        one, two = phrases._states(encoder, first)[0], phrases._states(encoder, second)[0]
        return float((one[4] - two[6]).norm() / one[4].norm())

    before = difference()
    phrases.loosen(encoder, 0.001)
    assert difference() > 3 * before


def test_the_student_learns_the_plain_answer(tmp_path):
    sizes, checkpoints = SIZES["tiny"], Checkpoints(tmp_path)
    weights = randomise(build_text_encoder(sizes)).state_dict()
    checkpoints.save("denoiser", {"text_encoder_average": weights, "step": 7})
    train_phrases(SHAPE, sizes, PhrasesSettings(seconds=6, captions=200, batch=32), checkpoints)
    state = checkpoints.load("denoiser")
    assert state["step"] == 7 and state["text_encoder"].keys() == weights.keys()
    lesson, probe = phrases.make_lesson(TOKENS, 100, "cpu"), nn.Linear(sizes.text_dim, 2)
    teacher = build_text_encoder(sizes)
    teacher.load_state_dict(weights)
    student = copy.deepcopy(teacher)
    student.load_state_dict(state["text_encoder_average"])
    untrained = copy.deepcopy(teacher)
    phrases.loosen(untrained, PhrasesSettings.queries)
    with torch.no_grad():
        error = float(phrases.losses(student, teacher, probe, lesson)[0])
        before = float(phrases.losses(untrained, teacher, probe, lesson)[0])
    assert error < 0.5 * before
