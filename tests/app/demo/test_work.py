"""What the worker makes for Look inside and Bench, and one comparison with the bundled model."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.app.demo.conftest import FORM, until
from vdit_sparse.app.demo import bench
from vdit_sparse.app.demo.desk import Desk
from vdit_sparse.app.demo.worker import Job
from vdit_sparse.app.inspect import spread
from vdit_sparse.app.options import InputError
from vdit_sparse.kernels.bench.problem import Shape

WHO = "a" * 32


def made(desk: Desk, kind: str, form: dict, seconds: float = 60.0) -> Job:
    """A finished job."""
    job = desk.submit(WHO, kind, dict(form))
    # As the page does.
    until(lambda: desk.status(WHO, job.name)["state"] not in ("waiting", "running"), seconds)
    assert job.state == "finished", job.error
    return job


def test_look_inside_keeps_what_inspect_found(studio):
    desk = Desk(studio)
    form = {**FORM, "runs": ["draft:block=64,dense_steps=1"], "size": "64x256", "steps": 3}
    first = made(desk, "generate", form)
    job = made(desk, "inspect", {**form, "maps_steps": 2, "maps_layers": 1})
    card, folder = desk.store.card(WHO, job.name), desk.store.folder(WHO, job.name)
    # The video of the former run, not a new one.
    old = desk.store.folder(WHO, first.name) / "draft.mp4"
    assert (folder / "video.mp4").read_bytes() == old.read_bytes()
    assert card["kind"] == "inspect" and card["grid"] == [3, 4, 16, 0]
    assert card["measured"] == [0, 2] and [look["layer"] for look in card["looks"]] == [1, 1]
    assert np.shape(card["tables"]["recall"]) == (2, 2, 2)
    assert [step for step, _ in card["densities"]] == [0, 1, 2]
    dense, sparse = card["looks"]
    assert all(head["order"] is None is head["ordered"] for head in dense["heads"])
    assert dense["why"] == "dense_steps" and sparse["why"] is None
    content = (folder / sparse["file"]).read_bytes()
    for head in sparse["heads"]:
        at, rows, columns = head["mass"]
        mass = np.frombuffer(content, np.float16, rows * columns, at).reshape(rows, columns)
        assert at % 4 == 0 and np.allclose(mass.sum(1), 1, atol=2e-3)
        # Draft has an order: the same attention by the blocks of that, as many as the mask's.
        at, *shape = head["ordered"]
        ordered = np.frombuffer(content, np.float16, int(np.prod(shape)), at).reshape(shape)
        assert shape == head["keep"][1:] and np.allclose(ordered.sum(1), 1, atol=2e-3)
        at, *shape = head["keep"]
        keep = np.frombuffer(content, np.uint8, int(np.prod(shape)), at)
        density = card["tables"]["density"][1][1][head["head"]]
        assert keep.mean() == pytest.approx(density, abs=1e-4)
    assert desk.store.file(WHO, job.name, sparse["file"]) is not None


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"runs": ["dense"]}, "dense attention visits everything"),
        ({"runs": ["radial:block=64", "draft"]}, "Choose one method"),
        ({"maps_steps": 99}, "1 to 8 steps"),
        ({"maps_layers": "all"}, "1 to 8 steps"),
    ],
)
def test_what_cannot_be_looked_into(form, words, studio):
    with pytest.raises(InputError, match=words):
        Desk(studio).submit(WHO, "inspect", {**FORM, **form})


def test_steps_are_spread_over_the_run():
    assert spread(range(16), 3) == (0, 8, 15)
    assert spread(range(2), 8) == (0, 1)
    assert spread([3, 5, 9], 1) == (5,)


def test_another_image_is_another_run(studio, tmp_path):
    desk, tokens = Desk(studio), []
    for colour in ("orange", "navy"):
        Image.new("RGB", (64, 32), colour).save(tmp_path / "a.png")
        tokens.append(desk.upload_image(WHO, tmp_path / "a.png")[0])
    form = {**FORM, "model": "tiny-i2v", "runs": ["radial:block=64"], "size": "32x64"}
    first = made(desk, "generate", {**form, "image": tokens[0]})
    looks = {"maps_steps": 1, "maps_layers": 1}
    other = desk.submit(WHO, "inspect", {**form, **looks, "image": tokens[1]})
    # A run that waits keeps its file, whatever is uploaded after it.
    desk.store.uploads(WHO)[tokens[1]].unlink()
    until(lambda: other.state not in ("waiting", "running"))
    assert other.state == "finished", other.error
    before, after = (desk.store.folder(WHO, job.name) for job in (first, other))
    assert (after / "video.mp4").read_bytes() != (before / "radial.mp4").read_bytes()
    # Both have the frame that their command line names.
    assert "--image image.png" in (before / "command.txt").read_text()
    assert Image.open(before / "image.png").getpixel((0, 0)) == (255, 165, 0)
    assert Image.open(after / "image.png").getpixel((0, 0)) == (0, 0, 128)
    assert "image.png" in desk.store.card(WHO, other.name)["files"]


def test_bench(studio, monkeypatch):
    monkeypatch.setattr(bench, "MINI", {"mini": Shape(1, 16, 2, 8, 8)})
    form = {"what": "kernels", "of": "mini", "density": 0.5, "methods": ["radial"]}
    desk = Desk(studio)
    job = made(desk, "bench", form)
    card = json.loads((desk.store.folder(WHO, job.name) / "bench.json").read_text())
    assert {row["kernel"] for row in card["rows"]} >= {"sdpa", "gather"}
    assert {row["pattern"] for row in card["rows"]} >= {"dense", "local", "radial"}
    assert all(row["error"] < 1e-5 for row in card["rows"] if row["ms"] is not None)
    assert card["facts"]["torch"] and "gather" in {check["name"] for check in card["checks"]}
    assert not {"ffmpeg", "bundled model"} & {check["name"] for check in card["checks"]}
    assert desk.gallery(WHO)[0]["labels"] == ["kernels", "density 0.5"]


@pytest.mark.parametrize(
    "changed",
    [{"of": "wan-720p"}, {"what": "disks"}, {"density": 0.26}, {"methods": ["x"]}, {"methods": 1}],
)
def test_bench_measures_what_it_offers(changed, studio):
    form = {"what": "kernels", "of": "mini", "density": 0.5, "methods": ["radial"]}
    with pytest.raises(InputError, match="Choose"):
        bench.parse({**form, **changed}, studio)


@pytest.mark.slow
def test_the_bundled_model_is_compared(studio):
    form = {"prompt": "a red balloon rises", "runs": ["dense", "radial-mini", "draft-mini"]}
    form |= {"size": "128x224", "num_frames": 9, "steps": 6}
    desk = Desk(studio)
    job = made(desk, "compare", form, 600)
    runs = desk.store.card(WHO, job.name)["runs"]
    assert [run["name"] for run in runs] == ["dense", "radial-mini", "draft-mini"]
    assert all(run["psnr"] > 15 and 0 < run["density"] <= 1 for run in runs[1:])
