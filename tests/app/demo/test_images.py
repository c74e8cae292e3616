"""A model of images in the studio: what is known of it, its runs, its script, what is refused."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

from tests.app.demo.conftest import FORM
from tests.app.demo.test_work import WHO, made
from vdit_sparse.app.demo import ask, models
from vdit_sparse.app.demo.desk import Desk
from vdit_sparse.app.demo.limits import Limits
from vdit_sparse.app.options import InputError

IMAGE = {**FORM, "model": "tiny-flux", "runs": ["dense", "draft:block=64,density=0.25"]}


def test_what_is_known_of_a_model_of_images(studio, tmp_path):
    about = Desk(studio).about("tiny-flux")
    assert about["images"] and list(about["refused"]) == ["radial"]
    assert about["defaults"]["height"] == 32 and "num_frames" not in about["defaults"]
    assert "draft-flux-few-steps" in about["presets"]
    assert not Desk(studio).about("tiny")["images"]
    # Published models are known by their table, those without a size of their own by their class.
    flux = models.known("black-forest-labs/FLUX.1-dev")
    assert flux.images and flux.defaults["guidance_scale"] == 3.5 and "draft" not in flux.refused
    wan = models.known("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    assert not wan.images and wan.defaults["num_frames"] == 81 and "radial-wan2.1" in wan.presets
    assert models.known("nobody/knows").defaults == {"fps": 16}
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert models.known(str(tmp_path)).defaults["height"] == 1024


def test_frames_and_pixels_of_an_image(studio, tmp_path):
    out = tmp_path / "out"
    request = ask.read({**IMAGE, "num_frames": 1}, studio, out, {})
    assert request.num_frames is None and "--num-frames" not in request.command
    with pytest.raises(InputError, match="makes images: leave num_frames out, got 9"):
        ask.read({**IMAGE, "num_frames": 9}, studio, out, {})
    small = replace(studio, limits=replace(Limits(), pixels=32 * 24))
    ask.read(IMAGE, small, out, {})
    with pytest.raises(InputError, match="at most 1,536 pixels in a frame"):
        ask.read({**IMAGE, "size": "32x50"}, small, out, {})


def test_images_are_compared_and_their_script_repeats_them(studio, monkeypatch):
    desk = Desk(studio)
    job = made(desk, "compare", {**IMAGE, "dtype": "fp32"})
    card, folder = desk.store.card(WHO, job.name), desk.store.folder(WHO, job.name)
    pictures = {"dense.png", "draft.png", "side_by_side.png", "contact_sheet.png"}
    assert pictures < set(card["files"]) and not list(folder.glob("*.mp4"))
    assert all((folder / name).is_file() for name in card["files"])
    assert (card["frames"], card["height"], card["width"]) == (1, 32, 48)
    dense, draft = card["runs"]
    assert draft["density"] < 1 and 10 < draft["psnr"] < 100 and draft["vmaf"] is None
    before = {name: Image.open(folder / f"{name}.png").tobytes() for name in ("dense", "draft")}
    text = card["script"].replace("'tiny-flux'", repr(str(studio.root / "tiny-flux")))
    (folder / "again.py").write_text(text)
    for name in before:
        (folder / f"{name}.png").unlink()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runpy.run_path("again.py")
    for name, content in before.items():
        assert Image.open(folder / f"{name}.png").tobytes() == content


def test_the_api_gives_images(served):
    client = Client(served[0], verbose=False)
    runs, settings = ["dense", "draft:block=64"], {"model": "tiny-flux", "size": "48x64"}
    card, files = client.predict("a fox", runs, settings, api_name="/generate")
    found = {Path(file).name: file for file in files}
    assert {"dense.png", "draft.png", "side_by_side.png"} < found.keys() and card["frames"] == 1
    assert Image.open(found["draft.png"]).size == (64, 48)
    with pytest.raises(AppError, match="makes images: leave num_frames out"):
        client.predict("a fox", runs, {**settings, "num_frames": 5}, api_name="/generate")


def test_look_inside_an_image(studio):
    desk = Desk(studio)
    form = {**IMAGE, "runs": IMAGE["runs"][1:], "maps_steps": 1, "maps_layers": 1}
    job = made(desk, "inspect", form)
    card, folder = desk.store.card(WHO, job.name), desk.store.folder(WHO, job.name)
    # 16 x 24 tokens, and 16 of text.
    assert card["grid"] == [1, 16, 24, 16] and card["layers"] == 3
    assert card["video"] == "video.png"
    assert (folder / "video.png").read_bytes() == (folder / "draft.png").read_bytes()


def test_a_video_of_one_frame_is_a_picture_too(studio):
    desk = Desk(studio)
    job = made(desk, "generate", {**FORM, "runs": ["dense"], "num_frames": 1})
    card = desk.store.card(WHO, job.name)
    assert "dense.png" in card["files"] and "'num_frames': 1" in card["script"]
    assert ".frames[0]" in card["script"] and "dense.mp4" not in card["files"]
    compile(card["script"], "again.py", "exec")
