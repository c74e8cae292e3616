"""From a form to a request, a command line and a script; and what a form may not ask for."""

import dataclasses
import json
import runpy
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.app.demo.conftest import FORM
from vdit_sparse.app import cli
from vdit_sparse.app.demo import ask, forms, models
from vdit_sparse.app.demo.limits import Limits
from vdit_sparse.app.demo.script import script
from vdit_sparse.app.options import RUNNABLE, InputError, parse_compare
from vdit_sparse.methods import METHODS

FORMS = [
    FORM,
    {**FORM, "runs": ["dense", "radial:block=64,decay=0.5", "draft:block=64"], "seed": 3},
    {**FORM, "runs": ["draft-wan2.1:block=64", "dense"], "size": "32x32", "dtype": "fp32"},
    {**FORM, "num_frames": 5, "steps": 1, "guidance_scale": 1.5, "negative_prompt": "a 'dog'"},
]


@pytest.mark.parametrize("form", FORMS)
def test_the_command_line_asks_for_the_same(form, studio, tmp_path, monkeypatch):
    asked = ask.read(form, studio, tmp_path / "out", {})
    found = {}
    monkeypatch.setattr(cli, "generate_and_show", found.update)
    words = shlex.split(asked.command)[1:]
    words[words.index("--model") + 1] = str(studio.root / "tiny")
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    same = ask.parse_request(found)
    given = {"out", "command", "overwrite", "device", "model"}
    for field in dataclasses.fields(asked):
        if field.name not in given:
            assert getattr(same, field.name) == getattr(asked, field.name), field.name
    assert asked.model == same.model == str(studio.root / "tiny")


def test_the_script_makes_the_same_frames(studio, tmp_path, monkeypatch, capsys):
    from vdit_sparse.app.generate import generate

    form = {**FORM, "runs": ["dense", "radial:block=64"], "dtype": "fp32", "size": "64x64"}
    asked = ask.read(form, studio, tmp_path / "out", {})
    report = generate(asked, lambda *_: None)
    names = [run.name for run in report.runs]
    text = script(asked, names, str(studio.root / "tiny"), 8)
    (tmp_path / "again.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    # It may pick another device than the studio was told to use.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    frames = runpy.run_path(str(tmp_path / "again.py"))["frames"]
    for run in report.runs:
        assert torch.equal(frames[run.name], run.clip.frames)
        assert (tmp_path / f"{run.name}.mp4").exists()
    said = capsys.readouterr().out
    assert f"density {report.runs[1].clip.density:.3f}" in said
    assert f"PSNR against dense {report.runs[1].metrics['psnr']:.2f} dB" in said


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"runs": []}, "Choose a method"),
        ({"runs": ["radial:block=7"]}, "block must be one of"),
        ({"runs": ["radiall"]}, "did you mean 'radial'"),
        ({"runs": [{"a": 1}]}, "must be text"),
        ({"runs": ["paro:calibration=/etc/passwd"]}, "upload the file"),
        ({"runs": ["dense", "radial", "draft", "adaspa", "rettention"]}, "at most 3 methods"),
        ({"size": "4096x4096"}, "at most 983,040 pixels in a frame, got 16,777,216"),
        ({"num_frames": 100_001}, "at most 129 frames"),
        ({"steps": 10**9}, "at most 100 steps"),
        ({"steps": "ten"}, "steps must be a whole number, got 'ten'"),
        ({"steps": True}, "steps must be a whole number"),
        ({"prompt": "x" * 3000}, "at most 2,000 characters"),
        ({"out": "/tmp"}, "no entry 'out'"),
        ({"calibration": "0" * 32}, "upload it again"),
        ({"image": "../../etc/passwd"}, "upload it again"),
        ({"model": "../tiny"}, "no model '../tiny'"),
        ({"model": "/etc"}, "no model '/etc'"),
        ({"model": "tiny/../../x"}, "no model"),
        ({"model": "Wan-AI/Wan2.1-T2V-14B-Diffusers"}, "start it with --model"),
        ({"model": "tiny\0"}, "no model"),
        ({"dtype": "int4"}, "must be one of"),
    ],
)
def test_what_cannot_be_is_refused_in_words(changed, words, studio, tmp_path):
    with pytest.raises(InputError) as refused:
        ask.read({**FORM, **changed}, studio, tmp_path / "out", {})
    assert words in str(refused.value)


def test_what_the_model_would_do_counts_too(studio, tmp_path):
    small = dataclasses.replace(studio, limits=dataclasses.replace(Limits(), frames=5))
    with pytest.raises(InputError, match="at most 5 frames, got 9"):
        ask.read(FORM, small, tmp_path / "out", {})


def test_a_link_out_of_the_root_is_outside(studio, tiny_image_model):
    (studio.root / "linked").symlink_to(tiny_image_model)
    try:
        with pytest.raises(InputError, match="no model 'linked'"):
            models.resolve("linked", studio)
    finally:
        (studio.root / "linked").unlink()


def test_pickles_are_not_read(studio, tmp_path):
    root = tmp_path / "root"
    (root / "old" / "vae").mkdir(parents=True)
    (root / "old" / "model_index.json").write_text("{}")
    (root / "old" / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"cposix\nsystem\n")
    with pytest.raises(
        InputError, match="run code when they are read .diffusion_pytorch_model.bin"
    ):
        models.resolve("old", dataclasses.replace(studio, root=root))


def test_models_that_are_offered(studio):
    own = dataclasses.replace(studio, models=("some/model",))
    tiny = ["tiny", "tiny-flux", "tiny-i2v"]
    assert models.offered(own) == ["bundled", "mini-fast", "some/model", *tiny]
    assert models.resolve("some/model", own) == "some/model"
    assert models.resolve("mini-fast", own) == "mini-fast"
    assert models.resolve("bundled", own) is None
    found = models.known(models.resolve("tiny", own))
    assert found.defaults["num_frames"] == 9 and found.defaults["fps"] == 8
    assert (found.geometry.height, found.geometry.frames) == (16, 4)
    assert "radial-wan2.1" in found.presets and "radial-mini" not in found.presets
    assert not [name for name in found.presets if "-mini" in name]
    assert models.known(None).presets[0] == "radial-mini"
    own = models.known("mini-fast").presets
    assert own == tuple(f"{x}-mini-fast" for x in ("radial", "adaspa", "draft", "rettention"))
    assert not set(own) & set(models.known(None).presets)


def test_every_field_has_a_control_that_its_method_takes():
    for method in forms.methods():
        kind = RUNNABLE[method["name"]]
        own = {field.name for field in dataclasses.fields(kind)} - forms.HIDDEN
        assert {field["name"] for field in method["fields"]} == own
        for field in method["fields"]:
            for value in _values(field):
                run = parse_compare(f"{method['name']}:{field['name']}={value}")
                assert run.method is not None
        assert sum(bool(field["help"]) for field in method["fields"]) >= len(own) - 3
    json.dumps(forms.presets())


def _values(field: dict) -> list:
    if field["kind"] == "choice":
        return field["choices"]
    if field["kind"] == "slider":
        return [field["low"], field["high"], field["default"]]
    return ["true", "false"] if field["kind"] == "switch" else [field["default"]]


def test_help_is_what_the_docstring_says():
    said = forms.help_of(METHODS["radial"])
    assert said["decay"].startswith("scales the band for d >= 2")
    assert said["last_dense_steps"] == said["dense_steps"]
    assert said["backend"].startswith("kernel backend, or None")
    assert Path("a") and "decimate" in said
