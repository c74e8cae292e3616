"""`vdit-sparse generate` from words to files, on a tiny random model."""

import json

import imageio.v3 as iio
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import vdit_sparse
from tests.tiny_models import WAN_CALL, tiny_wan
from vdit_sparse.app import generate
from vdit_sparse.app.checks import smallest_size
from vdit_sparse.app.options import parse_run
from vdit_sparse.eval.denoise import run, warm_up
from vdit_sparse.kernels.block_sparse import BACKENDS
from vdit_sparse.pipelines.spot_check import SpotCheck

WORDS = ["--prompt", "a cat runs", "--negative-prompt", "bad", "--device", "cpu"]
SMALL = ["--size", "128x128", "--num-frames", 17, "--steps", 3]
RADIAL = ["--method", "radial", "--set", "block=64", "--set", "dense_steps=1"]


def test_runs_are_compared_and_reported(cli, tiny_model, tmp_path):
    out = tmp_path / "new" / "folder"
    words = [*WORDS, *SMALL, *RADIAL, "--model", tiny_model, "--compare", "dense", "--seed", 3]
    result = cli("generate", *words, "--compare", "dense", "--dtype", "fp32", "--out", out)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text())
    names = ["dense", "dense-2", "radial"]
    videos = [f"{name}.mp4" for name in names]
    expected = {*videos, "side_by_side.mp4", "contact_sheet.png", "report.json"}
    assert {file.name for file in out.iterdir()} == expected == set(report["files"])
    for video in videos:
        assert iio.imread(out / video).shape == (17, 128, 128, 3)
    assert iio.imread(out / "side_by_side.mp4").shape[0] == 17
    for name in (*names, *expected):
        assert name in result.stdout

    assert report["status"] == "finished" and report["error"] is None
    assert report["prompt"] == "a cat runs" and report["negative_prompt"] == "bad"
    assert report["command"].startswith("vdit-sparse generate --prompt 'a cat runs' ")
    assert report["settings"]["seed"] == 3 and report["settings"]["num_inference_steps"] == 3
    assert report["settings"]["text_encoded_once"] is True
    assert report["model"]["dtype"] == "float32"
    assert report["versions"]["vdit_sparse"] == vdit_sparse.__version__
    assert report["versions"]["torch"] == torch.__version__
    dense, again, radial = report["runs"]
    assert [one["name"] for one in report["runs"]] == names
    assert dense["reference"] and dense["psnr"] is None and dense["speedup"] is None
    assert dense["density"] == again["density"] == 1.0
    assert again["psnr"] == 100.0 and again["ssim"] == pytest.approx(1.0)
    assert radial["method"]["fields"]["block"] == 64 and radial["method"]["name"] == "radial"
    assert 0 < radial["sparse_density"] < radial["density"] < 1
    assert radial["density"] == pytest.approx((1 + 2 * radial["sparse_density"]) / 3)
    assert radial["backend"] == "gather" and set(radial["reasons"]) == set(BACKENDS)
    assert 10 < radial["psnr"] < 100 and radial["ssim"] < 1
    assert 0 < radial["largest_first_error"] < 1 and dense["largest_first_error"] is None
    assert radial["speedup"] == pytest.approx(dense["denoise_seconds"] / radial["denoise_seconds"])
    for one in report["runs"]:
        assert one["denoise_seconds"] > 0 and one["decode_seconds"] > 0
        assert one["peak_memory_bytes"] > 1e6
    assert [one["warmup_steps"] for one in report["runs"]] == [1, 1, 2]


def test_a_layer_far_from_exact_attention_is_told_of(cli, tiny_model, tmp_path, monkeypatch):
    strict, _, *others = SpotCheck.__init__.__defaults__
    monkeypatch.setattr(SpotCheck.__init__, "__defaults__", (strict, 1e-6, *others))
    words = [*WORDS, *SMALL, *RADIAL, "--steps", 2, "--model", tiny_model, "--overwrite"]
    words += ["--out", tmp_path]
    warned = cli("generate", *words)
    assert warned.exit_code == 0 and "Warning:" in warned.stderr and "blocks.0" in warned.stderr
    stopped = cli("generate", *words, "--check", "strict")
    assert stopped.exit_code == 1 and "blocks.0" in stopped.stderr
    quiet = cli("generate", *words, "--check", "off")
    assert quiet.exit_code == 0 and "Warning" not in quiet.stderr
    assert cli("generate", *words, "--check", "maybe").exit_code == 2


def test_a_full_folder_is_left_alone_unless_told(cli, tiny_model, tmp_path):
    words = [*WORDS, "--size", "32x32", "--num-frames", 5, "--steps", 1, "--model", tiny_model]
    words += ["--out", tmp_path]
    (tmp_path / "notes.txt").write_text("mine")
    refused = cli("generate", *words, "--method", "dense")
    assert refused.exit_code == 2 and "--overwrite" in refused.stderr
    assert cli("generate", *words, "--method", "dense", "--overwrite").exit_code == 0
    assert (tmp_path / "dense.mp4").exists() and not (tmp_path / "side_by_side.mp4").exists()
    assert cli("generate", *words, *RADIAL, "--overwrite").exit_code == 0
    # The former results are gone, and what is not ours has stayed.
    names = {"radial.mp4", "contact_sheet.png", "report.json", "notes.txt"}
    assert {file.name for file in tmp_path.iterdir()} == names


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, 1), (KeyboardInterrupt, 130)])
def test_a_later_failure_keeps_the_finished_runs(
    cli, tiny_model, tmp_path, monkeypatch, error, status
):
    def breaks(pipe, method, inputs, on_step, check):
        if method is not None:
            raise error("the GPU is on fire")
        return run(pipe, method, inputs, on_step, check)

    monkeypatch.setattr(generate, "run", breaks)
    words = [*WORDS, "--size", "32x32", "--num-frames", 5, "--steps", 1, "--model", tiny_model]
    result = cli("generate", *words, *RADIAL, "--compare", "dense", "--out", tmp_path)
    assert result.exit_code == status
    assert "Traceback" not in result.output
    assert {file.name for file in tmp_path.iterdir()} == {"dense.mp4", "report.json"}
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["status"] == ("failed" if status == 1 else "interrupted")
    assert [one["name"] for one in report["runs"]] == ["dense"]
    last = result.stderr.strip().splitlines()[-1]
    if status == 1:
        assert "the GPU is on fire" in last and "dense.mp4" in last
        assert report["error"] == "RuntimeError: the GPU is on fire"


def test_while_nothing_is_finished_former_results_stay(cli, tiny_model, tmp_path, monkeypatch):
    words = [*WORDS, "--size", "32x32", "--num-frames", 5, "--steps", 1, "--model", tiny_model]
    words += ["--method", "dense", "--out", tmp_path, "--overwrite"]
    assert cli("generate", *words).exit_code == 0
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def breaks(*_):
        raise ValueError("no")

    monkeypatch.setattr(generate, "run", breaks)
    assert cli("generate", *words).exit_code == 1
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_debug_shows_where(cli, tiny_model, tmp_path, monkeypatch):
    def breaks(*_):
        raise ValueError("no")

    monkeypatch.setattr(generate, "run", breaks)
    words = [*WORDS, "--size", "32x32", "--num-frames", 5, "--model", tiny_model]
    result = cli("generate", *words, "--method", "dense", "--out", tmp_path, "--debug")
    assert result.exit_code == 1 and "Traceback" in result.stderr and "breaks" in result.stderr


def test_an_image_becomes_a_video(cli, tiny_image_model, tmp_path):
    Image.new("RGB", (60, 40), "orange").save(tmp_path / "first.png")
    words = [*WORDS, "--size", "64x64", "--num-frames", 5, "--steps", 1, *RADIAL]
    words += ["--model", tiny_image_model, "--image", tmp_path / "first.png"]
    result = cli("generate", *words, "--compare", "dense", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["model"]["pipeline"] == "WanImageToVideoPipeline"
    assert report["settings"]["image"] == str(tmp_path / "first.png")


@pytest.mark.parametrize(
    ("experts", "settings", "steps"), [(1, [], 1), (1, ["dense_steps=1"], 2), (2, [], 2)]
)
def test_a_warm_up_changes_nothing(experts, settings, steps, device):
    """At the same size and at the smallest one."""
    pipe = tiny_wan(experts=experts).to(device)
    inputs = {**WAN_CALL, "seed": 1}
    method = parse_run("radial", ["block=64", *settings]).method
    done = []
    cold = run(pipe, method, inputs, lambda *step: done.append(step))
    assert warm_up(pipe, method, inputs) == steps
    assert warm_up(pipe, method, {**inputs, **smallest_size(pipe)}) == steps
    warm = run(pipe, method, inputs, lambda *_: None)
    # Convolutions on a GPU may round differently from call to call.
    difference = (cold.frames.int() - warm.frames.int()).abs().max()
    assert difference <= (0 if device.type == "cpu" else 1) and cold.density == warm.density
    assert done[:3] == [(1, 3), (2, 3), (3, 3)]


def test_broken_frames_are_an_error():
    pipe = tiny_wan()
    pipe.vae.decoder.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="NaN; try --dtype fp32"):
        run(pipe, None, {**WAN_CALL, "seed": 0}, lambda *_: None)


def test_a_file_of_weights_says_or_is_told_its_base(cli, tmp_path, monkeypatch):
    file = tmp_path / "weights.safetensors"
    save_file({"odd": torch.zeros(1)}, file)
    words = ["generate", "--prompt", "a cat", "--model", file, "--device", "cpu"]
    result = cli(*words, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "name its pipeline with --base, such as" in result.stderr
    asked = {}

    def refuses(model, **options):
        asked.update(options)
        raise FileNotFoundError(f"no base of {model}")

    monkeypatch.setattr("vdit_sparse.pipelines.load.load_pipeline", refuses)
    result = cli(*words, "--out", tmp_path / "out", "--base", "some/pipeline")
    assert result.exit_code == 2 and asked["base"] == "some/pipeline"
