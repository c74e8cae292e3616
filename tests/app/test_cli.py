"""What the commands say, above all about bad input: one line, exit code 2, no traceback."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from vdit_sparse.app import doctor
from vdit_sparse.kernels.block_sparse import BACKENDS
from vdit_sparse.methods import METHODS

ROOT = Path(__file__).parents[2]
SPARSE_VDIT = ROOT / "pipelines/mini/calibrations/sparse-vdit-25-frames.safetensors"


def words_of(**options):
    """The words of a generate command in an empty folder, changed by options."""
    given = {"prompt": "a cat", "out": "{tmp}/out", "method": "radial", "device": "cpu", **options}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


BAD = {
    "empty prompt": ({"prompt": "  "}, "--prompt is empty"),
    "method": ({"method": "radal"}, "did you mean 'radial'"),
    "field": ({"set": "dekay=1"}, "did you mean 'decay'"),
    "value": ({"set": "decay=much"}, "decay must be a number"),
    "range": ({"set": "decay=-1"}, "above 0"),
    "kernel": ({"set": "backend=tritn"}, "one of .*triton.*got 'tritn'"),
    "preset": ({"preset": "radial-wan3"}, "no preset 'radial-wan3'"),
    "compare": ({"compare": "nothing"}, "--compare needs a method or preset"),
    "steps": ({"steps": 0}, "--steps must be at least 1, got 0"),
    "steps word": ({"steps": "many"}, "--steps"),
    "seed": ({"seed": -1}, "--seed must be at least 0"),
    "guidance": ({"guidance-scale": "nan"}, "--guidance-scale must be at least 0"),
    "size word": ({"size": "large"}, "--size must be HEIGHTxWIDTH"),
    "size": ({"model": "{model}", "size": "120x128"}, "16 pixels, got 120; nearest: 112 and 128"),
    "small size": ({"model": "{model}", "size": "128x8"}, "width .* got 8; nearest: 16"),
    "frames": ({"model": "{model}", "num-frames": 16}, "multiple of 4, got 16; nearest: 13 and 17"),
    "no frames": ({"num-frames": 0}, "--num-frames must be at least 1"),
    "device": ({"device": "gpu"}, "--device must be cpu"),
    "no such device": ({"device": "cuda:77"}, "torch finds .* cuda device"),
    "dtype": ({"dtype": "int8"}, "--dtype must be one of bf16"),
    "offload": ({"offload": "modle"}, "did you mean 'model'"),
    "offload on a CPU": ({"offload": "model"}, "needs a GPU"),
    "dense backend": ({"dense-backend": "flsh"}, "did you mean 'flash'"),
    "lora": ({"lora": "./no.safetensors"}, "no LoRA file"),
    "image": ({"image": "{tmp}/no.png"}, "There is no image"),
    "broken image": ({"image": "{tmp}/text.png"}, "Cannot read the image"),
    "out is a file": ({"out": "{tmp}/text.png"}, "is a file: name a folder"),
    "out in a file": ({"out": "{tmp}/text.png/out"}, "Cannot write"),
    "no folder": ({"model": "/no/such/model"}, "no model folder /no/such/model"),
    "no model": ({"model": "{tmp}"}, "no model_index.json"),
    "no network": ({"model": "no-such/model"}, "from the Hugging Face Hub.*network"),
    "no calibration": (
        {"method": "paro", "set": "calibration={tmp}/no.safetensors"},
        "There is no calibration file .*no.safetensors",
    ),
    "broken calibration": (
        {"method": "paro", "set": "calibration={tmp}/text.png"},
        "is no calibration file, or is cut off",
    ),
    "calibration of another method": (
        {"method": "paro", "set": f"calibration={SPARSE_VDIT}"},
        "is a calibration of SparseVDiTAttention, not of PAROAttention",
    ),
    "superfluous image": ({"model": "{model}", "image": "{tmp}/ok.png"}, "leave the image out"),
    "missing image": ({"model": "{image_model}"}, "give one with --image"),
    "unknown option": ({"stps": 3}, "No such option: --stps"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, cli, tmp_path, tiny_model, tiny_image_model):
    options, message = BAD[case]
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "ok.png")
    places = {"tmp": tmp_path, "model": tiny_model, "image_model": tiny_image_model}
    result = cli("generate", *(word.format(**places) for word in words_of(**options)))
    assert result.exit_code == 2, result.output
    # In this process the libraries' own bars are on; a real one is tried below.
    lines = [line for line in result.stderr.splitlines() if line.strip() and "it/s" not in line]
    lines = [line for line in lines if not line.startswith("loading the model")]
    assert len(lines) == 1 and re.search(message, lines[0]), lines
    assert "Traceback" not in result.output
    assert not list((tmp_path / "out").glob("*"))


def test_doctor_tells_what_works(cli):
    result = cli("doctor", "--json")
    assert result.exit_code == 0
    checks = json.loads(result.stdout)["checks"]
    named = {(check["section"], check["name"]): check for check in checks}
    for backend in BACKENDS:
        assert ("sparse kernels", backend) in named
    assert named["sparse kernels", "reference"]["ok"] is True
    assert named["sparse kernels", "gather"]["ok"] is True
    for backend in ("native", "_native_cudnn", "flash", "_flash_3", "sage", "xformers"):
        assert named["dense backends", backend]["detail"]
    assert named["versions", "torch"]["detail"]
    assert named["files", "ffmpeg"]["ok"] is True
    assert ("files", "bundled model") in named
    shown = cli("doctor")
    assert shown.exit_code == 0 and "sparse kernels" in shown.stdout


def test_doctor_survives_what_it_finds(monkeypatch):
    def breaks(*_):
        raise OSError("broken driver")

    monkeypatch.setattr(doctor, "machine", breaks)
    monkeypatch.setattr(doctor, "_attention_inputs", breaks)
    said = [check.detail for check in doctor.examine() if check.ok is False]
    assert said.count("broken driver") == 2


def test_methods_lists_every_field_and_preset(cli):
    result = cli("methods", "--json")
    assert result.exit_code == 0
    content = json.loads(result.stdout)
    assert [method["name"] for method in content["methods"]] == list(METHODS)
    radial = content["methods"][0]
    fields = {field["name"]: field for field in radial["fields"]}
    assert fields["decay"] == {"name": "decay", "type": "a number", "default": 0.2}
    assert fields["decimate"]["type"] == "true or false" and fields["refresh"]["default"] == "each"
    assert radial["description"].endswith(".") and "\n" not in radial["description"]
    preset = content["presets"]["WanTransformer3DModel"]["radial-wan2.1"]
    assert preset["fields"]["dense_steps"] == preset["changed"]["dense_steps"] == 12
    shown = cli("methods").stdout
    for word in ("RadialAttention", "decay", "radial-wan2.1"):
        assert word in shown


def test_the_program_itself(tmp_path, tiny_image_model):
    """A real process: the module runs, the libraries are quiet, and bad input gives code 2."""
    program = [sys.executable, "-m", "vdit_sparse.app.cli"]
    asked = subprocess.run([*program, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert asked.returncode == 0 and "generate" in asked.stdout
    words = ["generate", "--prompt", "x", "--out", tmp_path, "--model", tiny_image_model]
    wrong = subprocess.run([*program, *words], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and not wrong.stdout
    bar, line = wrong.stderr.splitlines()
    assert bar.startswith("loading the model")
    assert line == "This model makes videos from images: give one with --image FILE."


def test_the_command_line_imports_nothing_heavy():
    code = (
        "import vdit_sparse.app.cli, sys;"
        "print(sorted({'torch', 'diffusers', 'numpy', 'imageio'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stderr
