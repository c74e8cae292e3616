"""Files that users send, by the page's inputs and through the API: judged by what is in them."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from tests.app.demo.conftest import running
from vdit_sparse.app.checks import bundled_model
from vdit_sparse.app.demo.desk import Desk, read_image
from vdit_sparse.app.demo.limits import Limits
from vdit_sparse.app.options import InputError

WHO, ELSE = "a" * 32, "b" * 32
# What somebody may call a calibration.
NONE = {
    "text": b"not at all",
    "pickle": b"\x80\x04cposix\nsystem\n(S'true'\ntR.",
    "long": (2**62).to_bytes(8, "little") + b"{}",
    "empty": b"",
}


@pytest.mark.parametrize("name", NONE)
def test_a_calibration_is_one(name, studio, tmp_path):
    file = tmp_path / f"{name}.safetensors"
    file.write_bytes(NONE[name])
    with pytest.raises(InputError, match="no calibration file") as refused:
        Desk(studio).upload_calibration(WHO, file)
    assert str(tmp_path) not in str(refused.value)


def test_uploads_belong_to_one_user_and_the_oldest_go(studio, tmp_path):
    desk = Desk(studio)
    good = sorted((bundled_model() / "calibrations").glob("*.safetensors"))[0]
    token, said = desk.upload_calibration(WHO, good)
    assert "7 x 16 x 28 tokens" in said and set(desk.store.uploads(WHO)) == {token}
    assert desk.store.uploads(ELSE) == {}
    form = {"prompt": "a cat", "model": "tiny", "runs": ["paro"], "calibration": token}
    with pytest.raises(InputError, match="not there any more: upload it again"):
        desk.submit(ELSE, "generate", form)
    for number in range(12):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "i.png")
        desk.upload_image(WHO, tmp_path / "i.png")
        time.sleep(0.01)
    assert len(desk.store.uploads(WHO)) == 10 and token not in desk.store.uploads(WHO)


def test_images_that_are_none(tmp_path):
    (tmp_path / "a.png").write_bytes(b"<svg onload=alert(1)>")
    with pytest.raises(InputError, match="no image"):
        read_image(tmp_path / "a.png", 10**6)
    Image.new("L", (2000, 1000)).save(tmp_path / "b.png")
    with pytest.raises(InputError, match="2,000 x 1,000 pixels"):
        read_image(tmp_path / "b.png", 10**6)
    assert read_image(tmp_path / "b.png", 2 * 10**6).mode == "RGB"


def test_a_calibration_through_the_api(served, calibration):
    address, desk = served
    client = Client(address, verbose=False)
    settings = {"model": "tiny", "size": "128x128", "dtype": "fp32"}
    given = {"calibration": handle_file(str(calibration)), "api_name": "/generate"}
    card, files = client.predict("a cat runs", ["dense", "paro"], settings, **given)
    assert [run["name"] for run in card["runs"]] == ["dense", "paro"]
    assert 0 < card["runs"][1]["density"] < 1
    (kept,) = (Path(file) for file in files if file.endswith("calibration.safetensors"))
    assert kept.read_bytes() == calibration.read_bytes()
    assert "paro:calibration=calibration.safetensors" in card["command"]
    assert str(desk.store.root) not in str(card)


def test_a_first_frame_through_the_api(served, tmp_path):
    Image.new("RGB", (96, 48), "orange").save(tmp_path / "frame.jpg")
    client = Client(served[0], verbose=False)
    call = ("a cat runs", ["dense"], {"model": "tiny-i2v", "steps": 1})
    with pytest.raises(AppError, match="makes videos from images"):
        client.predict(*call, api_name="/generate")
    image = handle_file(str(tmp_path / "frame.jpg"))
    card, files = client.predict(*call, image=image, api_name="/generate")
    assert card["files"][-1] == "image.png" and "--image image.png" in card["command"]
    assert Image.open(files[-1]).size == (96, 48)


def test_bad_files_through_the_api_are_refused_in_words(served, tmp_path):
    client = Client(served[0], verbose=False)
    Image.new("L", (4096, 4096)).save(tmp_path / "large.png")
    (tmp_path / "none.png").write_bytes(b"GIF89a")
    (tmp_path / "none.safetensors").write_bytes(NONE["pickle"])
    for name, entry, words in (
        ("large.png", "image", "4,096 x 4,096 pixels: send one of at most 15,728,640"),
        ("none.png", "image", "This is no image that can be read"),
        ("none.safetensors", "calibration", "This file is no calibration file"),
    ):
        given = {entry: handle_file(str(tmp_path / name)), "api_name": "/generate"}
        with pytest.raises(AppError, match=words):
            client.predict("a cat", ["dense"], {"model": "tiny"}, **given)


def test_a_file_that_is_too_large_is_not_taken(studio, tmp_path):
    (tmp_path / "large.safetensors").write_bytes(b"0" * 60_000)
    small = replace(studio, limits=replace(Limits(), body=50_000))
    with running(small) as (address, desk):
        given = {"calibration": handle_file(str(tmp_path / "large.safetensors"))}
        with pytest.raises(ValueError, match="exceeds the maximum file size of 50000 bytes"):
            Client(address, verbose=False).predict("a", ["paro"], **given, api_name="/generate")
        assert not desk.worker.jobs


@pytest.mark.parametrize("place", ["/etc/passwd", "{store}/users/{who}/uploads/{token}"])
def test_files_of_the_server_or_of_others_are_no_uploads(place, served, user, tmp_path):
    address, desk = served
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    token, _ = desk.upload_image(ELSE, tmp_path / "a.png")
    path = place.format(store=desk.store.root, who=ELSE, token=token)
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    before = len(desk.worker.jobs)
    for settings, *files in (
        ({}, file, None),
        ({}, None, file),
        ({"image": file}, None, None),
        ({"image": token}, None, None),
    ):
        data = ["a cat", ["dense"], {"model": "tiny-i2v", **settings}, *files]
        event = user.post("/gradio_api/call/generate", json={"data": data}).json()["event_id"]
        said = user.get(f"/gradio_api/call/generate/{event}").text
        assert "event: error" in said and "event: complete" not in said
        # The file was not even looked into.
        assert "no image" not in said and "no calibration" not in said
    assert "upload it again" in said and len(desk.worker.jobs) == before


def test_settings_are_an_object(served):
    with pytest.raises(AppError, match="must be an object"):
        Client(served[0], verbose=False).predict("a", ["dense"], [1], api_name="/generate")
