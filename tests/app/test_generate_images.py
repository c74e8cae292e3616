"""`vdit-sparse generate` with a model of images: PNG in place of videos."""

import json

import pytest
import torch
from PIL import Image

from tests.tiny_models.catalogue import TINY
from vdit_sparse.app.generate import generate
from vdit_sparse.app.options import InputError, parse_compare
from vdit_sparse.app.request import Request

WORDS = ["generate", "--prompt", "a cat runs", "--size", "32x48", "--steps", 2, "--device", "cpu"]
DRAFT = ["--method", "draft", "--set", "block=64", "--set", "density=0.25"]


def test_images_are_compared_and_reported(cli, tiny_flux, tmp_path):
    words = [*WORDS, *DRAFT, "--model", tiny_flux, "--dtype", "fp32", "--out", tmp_path]
    result = cli(*words, "--compare", "dense")
    assert result.exit_code == 0, result.output
    expected = {"dense.png", "draft.png", "side_by_side.png", "contact_sheet.png", "report.json"}
    report = json.loads((tmp_path / "report.json").read_text())
    assert {file.name for file in tmp_path.iterdir()} == expected == set(report["files"])
    dense, draft = report["runs"]
    for one in (dense, draft):
        image = Image.open(tmp_path / one["file"])
        assert (image.format, image.size) == ("PNG", (48, 32)) and one["file"] in result.stdout
    # Both under their labels, enlarged by a whole number.
    assert Image.open(tmp_path / "side_by_side.png").width == 2 * 7 * 48 + 8
    assert 10 < draft["psnr"] < 100 and draft["density"] < 1
    assert report["model"]["pipeline"] == "FluxPipeline"
    assert "num_frames" not in report["settings"]

    # The former report's files go, whatever their kind; what is not ours stays.
    (tmp_path / "notes.txt").write_text("mine")
    assert cli(*words, "--num-frames", 1, "--overwrite").exit_code == 0
    left = {"draft.png", "contact_sheet.png", "report.json", "notes.txt"}
    assert {file.name for file in tmp_path.iterdir()} == left


def test_frames_of_an_image_are_one_line(cli, tiny_flux, tmp_path):
    out = tmp_path / "out"
    result = cli(*WORDS, *DRAFT, "--model", tiny_flux, "--num-frames", 9, "--out", out)
    said = "FluxPipeline makes images: leave --num-frames out, got 9."
    assert result.exit_code == 2 and result.stderr.strip().splitlines()[-1].endswith(said)
    assert not any(out.iterdir())


def test_an_image_needs_a_size_to_be_fitted_to(tmp_path):
    pipe = TINY["flux-kontext"]().pipe
    Image.new("RGB", (64, 32), "red").save(tmp_path / "red.png")
    request = Request(
        prompt="a cat runs",
        runs=(parse_compare("dense"),),
        image=tmp_path / "red.png",
        device="cpu",
        out=tmp_path / "out",
    )
    with pytest.raises(InputError, match="give --size HxW"):
        generate(request, lambda *_: None, lambda _: pipe)


def test_a_video_of_one_frame_is_an_image(cli, tiny_model, tmp_path):
    words = [*WORDS, "--model", tiny_model, "--method", "dense", "--num-frames", 1]
    result = cli(*words, "--compare", "dense", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "dense.png").size == (48, 32)
    assert not list(tmp_path.glob("*.mp4"))


@pytest.mark.parametrize("name", ["cosmos2-image", "qwen-image", "z-image"])
def test_other_models_of_images(name, tmp_path):
    """One with the autoencoder of a model of videos, and those with other ways to say guidance."""
    tiny = TINY[name]()
    length = {key: tiny.call[key] for key in ("max_sequence_length",) if key in tiny.call}
    tiny.pipe.generation = length
    request = Request(
        prompt="a cat runs",
        runs=(parse_compare("draft:block=64,density=0.25"),),
        size=(tiny.call["height"], tiny.call["width"]),
        steps=1,
        device="cpu",
        out=tmp_path,
    )
    report = generate(request, lambda *_: None, lambda _: tiny.pipe)
    (run,) = report.runs
    assert report.files == ["draft.png", "contact_sheet.png"]
    assert run.clip.frames.dtype == torch.uint8 and len(run.clip.frames) == 1
