"""Sizes are checked before anything is downloaded or loaded."""

import re

import pytest

from tests.tiny_models import tiny_wan, tiny_wan_i2v
from tests.tiny_models.catalogue import TINY
from vdit_sparse.app.checks import (
    Geometry,
    check_after_loading,
    check_size,
    geometry_of,
    geometry_of_folder,
    smallest_size,
)
from vdit_sparse.app.loading import takes_encoded_text
from vdit_sparse.app.options import InputError
from vdit_sparse.app.request import Request
from vdit_sparse.eval.denoise import makes_images
from vdit_sparse.pipelines.cogvideox import CogVideoXVideoToVideoPipeline

WORDS = ("--prompt", "a cat", "--device", "cpu", "--method", "dense")


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        ("wan2.1-t2v-14b", ("--size", "710x1280"), "multiple of 16 pixels, got 710; nearest: 704"),
        (
            "Lightricks/LTX-2",
            ("--size", "720x1280"),
            "multiple of 32 pixels, got 720; nearest: 704",
        ),
        ("ltx2", ("--num-frames", 100), "multiple of 8, got 100; nearest: 97 and 105"),
        ("allegro", ("--num-frames", 89), "must be a multiple of 4, got 89; nearest: 88 and 92"),
    ],
)
def test_published_models_are_known_without_the_network(model, words, message, cli, tmp_path):
    result = cli("generate", *WORDS, "--model", model, *words, "--out", tmp_path / "out")
    assert result.exit_code == 2 and re.search(message, result.stderr), result.output


def test_the_geometry_of_what_is_in_hand(tiny_model):
    assert geometry_of_folder(tiny_model) == Geometry(16, 16, 4)
    assert geometry_of_folder(None) == geometry_of_folder("mini-fast") is not None
    assert geometry_of_folder("some/model") is None


@pytest.mark.parametrize("name", ["hunyuan-video", "flux", "cogvideox", "mochi", "qwen-image"])
def test_the_sizes_that_a_loaded_pipeline_runs_at_are_allowed(name):
    tiny = TINY[name]()
    unit = geometry_of(tiny.pipe)
    for call in (tiny.call, tiny.call | tiny.odd):
        check_size(unit, (call["height"], call["width"]), call.get("num_frames"))
    assert smallest_size(tiny.pipe) == {}


def test_models_of_images_need_none(tmp_path):
    """FLUX.2 edits images or makes them from text, which it encodes without a negative one."""
    pipe = TINY["flux2-klein"]().pipe
    check_after_loading(pipe, Request(prompt="a cat", runs=(), out=tmp_path))
    assert not takes_encoded_text(pipe)
    with pytest.raises(InputError, match="makes videos from images"):
        check_after_loading(tiny_wan_i2v(), Request(prompt="a cat", runs=(), out=tmp_path))
    assert takes_encoded_text(tiny_wan())


def test_a_small_image_has_no_frames():
    tiny = TINY["cosmos2-image"]()
    assert makes_images(tiny.pipe) and set(smallest_size(tiny.pipe)) == {"height", "width"}


def test_a_video_made_from_a_video_is_no_image():
    pipe = CogVideoXVideoToVideoPipeline(**TINY["cogvideox"]().pipe.components)
    assert not makes_images(pipe)
