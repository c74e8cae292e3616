"""`vdit-sparse eval run` and `eval report` from words to files, on tiny random models."""

import csv
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from PIL import Image

from vdit_sparse.app.evaluate_report import difference, read_frames
from vdit_sparse.app.evaluate_request import parse_part
from vdit_sparse.app.options import InputError
from vdit_sparse.app.video import write_video
from vdit_sparse.eval.baseline import Baseline
from vdit_sparse.eval.denoise import run
from vdit_sparse.eval.store import digest, read_protocol, read_rows

SMALL = ["--size", "96x96", "--num-frames", 5, "--steps", 2, "--device", "cpu", "--dtype", "fp32"]
# 2 x 6 x 6 tokens are two blocks, of which each row keeps one.
DRAFT = "draft:block=64,density=0.25,dense_steps=1"
METRICS = ["--metrics", "psnr,ssim,latent_error,temporal_flickering"]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "two.txt"
    file.write_text("a cat runs\nA cat runs\n")
    return file


@pytest.fixture
def one(tmp_path):
    """Words that put a suite of one prompt in the place of that of `words`."""
    (tmp_path / "one.txt").write_text("a cat runs\n")
    return ["--suite", tmp_path / "one.txt"]


@pytest.fixture
def words(prompts, tiny_model, tmp_path):
    """Of a small evaluation into tmp_path/out."""
    given = ["eval", "run", "--suite", prompts, "--model", tiny_model, *SMALL, *METRICS]
    return [*given, "--method", "dense", "--method", DRAFT, "--out", tmp_path / "out"]


def test_from_prompts_to_a_report(cli, words, tmp_path):
    out = tmp_path / "out"
    result = cli(*words)
    assert result.exit_code == 0, result.output
    assert "4 of 4 samples" in result.stdout and "vdit-sparse eval report" in result.stdout
    rows = read_rows(out)
    assert len(rows) == 4 and len({row["file"].casefold() for row in rows}) == 4
    for row in rows:
        assert iio.imread(out / row["file"]).shape == (5, 96, 96, 3)
        assert row["peak_memory_bytes"] > 1e6 and row["denoise_seconds"] > 0
        assert row["warmup_steps"] == (1 if row["method"]["name"] == "dense" else 2)
        assert 0 < row["metrics"]["temporal_flickering"] <= 1
    dense, draft = ([r for r in rows if r["method"]["name"] == x] for x in ("dense", "draft"))
    assert {row["density"] for row in dense} == {1.0} and "psnr" not in dense[0]["metrics"]
    for row in draft:
        assert 10 < row["metrics"]["psnr"] < 100 and row["speedup"] > 0
        assert 0 < row["metrics"]["latent_error"] < 1
        assert row["method"]["settings"]["dense_steps"] == 1
    protocol = read_protocol(out)
    assert protocol["baseline"]["backend"] == "native"
    assert protocol["metrics"] == ["psnr", "ssim", "latent_error", "temporal_flickering"]
    assert not list((out / "frames").iterdir())

    before = (out / "rows" / "main.jsonl").read_bytes()
    again = cli(*words)
    assert again.exit_code == 0 and (out / "rows" / "main.jsonl").read_bytes() == before

    # A broken video costs its picture, not the report.
    worst = min(draft, key=lambda row: row["metrics"]["psnr"])
    (out / worst["file"]).write_bytes(b"no video")
    result = cli("eval", "report", out, "--worst", 2)
    assert result.exit_code == 0, result.output
    page = (out / "report" / "report.html").read_text()
    assert page.count("data:video/mp4;base64,") == 1 and page.count("There is no picture") == 1
    assert page.count("<svg") == 4 and "http" not in page.replace("http://www.w3.org", "")
    (first, second) = csv.DictReader((out / "report" / "methods.csv").open())
    assert (first["label"], first["density_mean"]) == ("dense", "1.0")
    mean = sum(row["metrics"]["psnr"] for row in draft) / 2
    assert float(second["psnr_mean"]) == pytest.approx(mean) and second["psnr_prompts"] == "2"
    assert len(list(csv.DictReader((out / "report" / "samples.csv").open()))) == 4
    assert "| 2 | draft dense_steps=1 block=64 |" in (out / "report" / "report.md").read_text()

    # So do one that is gone, and one of another size.
    other = next(row for row in draft if row is not worst)
    (out / worst["file"]).unlink()
    write_video(out / other["file"], torch.zeros(5, 3, 32, 32, dtype=torch.uint8), 8)
    assert cli("eval", "report", out, "--worst", 2).exit_code == 0
    page = (out / "report" / "report.html").read_text()
    assert "is missing" in page and "the two files differ in size" in page


def test_shards_and_torchrun_share_the_samples(cli, words, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert cli(*words, "--shard", "1/2").exit_code == 0
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    result = cli(*words)
    assert result.exit_code == 0, result.output
    names = {file.name: len(file.read_text().splitlines()) for file in (out / "rows").iterdir()}
    assert names == {"shard-1-of-2.jsonl": 2, "shard-2-of-2.jsonl": 2}
    assert len(read_rows(out)) == 4


def test_parts():
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert parse_part(None, {}) == ((0, 1), None)
    assert parse_part("2/8", {}) == ((1, 8), None)
    assert parse_part("2/8", torchrun) == ((7, 32), 1)
    assert parse_part(None, {"RANK": "0"}) == ((0, 1), None)
    for bad in ("0/8", "9/8", "1", "1/0", "a/b", "-1/2"):
        with pytest.raises(InputError, match="--shard must be such as 1/8 to 8/8"):
            parse_part(bad, {})


def test_other_settings_do_not_mix(cli, words, one, tmp_path):
    assert cli(*words, *one).exit_code == 0
    mixed = cli(*words, *one, "--guidance-scale", 1)
    assert mixed.exit_code == 2
    assert "settings.guidance_scale: 5.0 and 1.0" in mixed.stderr and "--out" in mixed.stderr
    other = ["--out", tmp_path / "other", "--guidance-scale", 1]
    assert cli(*words, *one, *other).exit_code == 0
    both = cli("eval", "report", tmp_path / "out", tmp_path / "other")
    assert both.exit_code == 2 and "different protocols (settings.guidance_scale" in both.stderr
    assert not (tmp_path / "out" / "report").exists()


def test_of_processes_that_start_at_once_one_chooses_the_baseline(
    cli, words, one, tmp_path, monkeypatch
):
    """Another one writes the protocol while this one still times dense attention."""
    assert cli(*words, *one, "--dense-backend", "native").exit_code == 0
    protocol = read_protocol(tmp_path / "out")
    protocol["baseline"]["backend"] = "_native_math"
    other = tmp_path / "other"

    def found(pipe, inputs):
        other.mkdir(exist_ok=True)
        (other / "protocol.json").write_text(json.dumps(protocol))
        return Baseline("native", {"native": 1.0}, {})

    monkeypatch.setattr("vdit_sparse.app.evaluate_worker.find_baseline", found)
    result = cli(*words, *one, "--out", other)
    assert result.exit_code == 0, result.output
    assert read_protocol(other) == protocol
    assert {row["protocol"] for row in read_rows(other)} == {digest(protocol)}
    refused = cli(*words, *one, "--out", other, "--dense-backend", "native")
    assert refused.exit_code == 2 and "baseline.backend: _native_math and native" in refused.stderr


def test_what_fails_costs_its_sample_and_is_tried_again(cli, words, tmp_path, monkeypatch):
    sparse = []

    def breaks(pipe, method, inputs, on_step):
        sparse.extend([method] if method is not None else [])
        if len(sparse) == 1 and method is not None:
            raise RuntimeError("the GPU is on fire")
        return run(pipe, method, inputs, on_step)

    with monkeypatch.context() as patched:
        patched.setattr("vdit_sparse.app.evaluate_worker.run", breaks)
        result = cli(*words)
    assert result.exit_code == 1 and "3 of 4 samples are in" in result.stderr
    assert "1 failed" in result.stderr and "Traceback" not in result.output
    assert cli("eval", "report", tmp_path / "out", "--worst", 0).exit_code == 0
    text = (tmp_path / "out" / "report" / "report.md").read_text()
    assert "the GPU is on fire" in text and "1 samples that not every method has" in text
    # The dense frames of the failed sample were kept for it.
    assert cli(*words).exit_code == 0
    assert len(read_rows(tmp_path / "out")) == 4
    assert not list((tmp_path / "out" / "frames").iterdir())


def test_images_become_png(cli, tiny_model, tmp_path):
    suite = tmp_path / "still.toml"
    suite.write_text('media = "image"\nprompts = ["a cat", "a dog"]')
    words = ["eval", "run", "--suite", suite, "--model", tiny_model, "--method", DRAFT]
    words += ["--size", "64x64", "--steps", 2, "--device", "cpu", "--metrics", "psnr,ssim"]
    result = cli(*words, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    for row in read_rows(tmp_path / "out"):
        assert Path(row["file"]).suffix == ".png"
        assert Image.open(tmp_path / "out" / row["file"]).size == (64, 64)
    assert cli("eval", "report", tmp_path / "out").exit_code == 0
    assert "data:image/png" in (tmp_path / "out" / "report" / "report.html").read_text()
    refused = cli(*words, "--out", tmp_path / "out", "--num-frames", 5)
    assert refused.exit_code == 2 and "of images: leave --num-frames out" in refused.stderr


def test_a_model_of_images(cli, tiny_flux, prompts, tmp_path):
    suite, out = tmp_path / "still.toml", tmp_path / "out"
    suite.write_text('media = "image"\nprompts = ["a cat", "a dog"]')
    words = ["eval", "run", "--model", tiny_flux, "--method", "draft:block=64,density=0.25"]
    words += ["--size", "32x48", "--steps", 2, "--device", "cpu", "--dtype", "fp32", "--out", out]
    result = cli(*words, "--suite", suite, "--metrics", "psnr,ssim,sharpness,latent_error")
    assert result.exit_code == 0, result.output
    rows = read_rows(out)
    assert len(rows) == 4
    for row in rows:
        image = Image.open(out / row["file"])
        assert (image.format, image.size, row["frames"]) == ("PNG", (48, 32), [1, 3, 32, 48])
        assert row["denoise_seconds"] > 0 and row["decode_seconds"] > 0
        assert row["metrics"]["sharpness"] > 0 and not row["unmeasured"]
    sparse = [row for row in rows if row["method"]["name"] == "draft"]
    # Both models hear the text, and the method drops some of it.
    assert len({row["frames_sha256"] for row in rows}) == 4
    assert all(row["density"] < 1 and 10 < row["metrics"]["psnr"] < 100 for row in sparse)
    assert all(0 < row["metrics"]["latent_error"] < 1 for row in sparse)
    result = cli("eval", "report", out)
    assert result.exit_code == 0, result.output
    page = (out / "report" / "report.html").read_text()
    assert page.count("data:image/png") == 2 and "32 x 48 pixels, images, 2 steps" in page

    time = cli(*words, "--suite", suite, "--metrics", "psnr,temporal_flickering")
    assert time.exit_code == 2 and "it needs 2 frames, and an image is one" in time.stderr
    videos = cli(*words, "--suite", prompts, "--metrics", "psnr")
    assert videos.exit_code == 2 and "FluxPipeline makes images" in videos.stderr


def test_a_broken_first_frame_costs_its_samples(cli, tiny_image_model, tmp_path):
    Image.new("RGB", (60, 40), "orange").save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no picture")
    table = tmp_path / "table.csv"
    table.write_text("prompt,image\na cat,good.png\na dog,bad.png\n")
    words = ["eval", "run", "--suite", table, "--model", tiny_image_model, *SMALL, *METRICS]
    result = cli(*words, "--method", DRAFT, "--out", tmp_path / "out")
    assert result.exit_code == 1 and "2 of 4 samples are in" in result.stderr
    (failure,) = read_rows(tmp_path / "out", "failures")
    assert "Cannot read the image" in failure["error"] and failure["prompt"] == "a dog"


def test_vbench_i2v_makes_videos_of_its_images(cli, tiny_image_model, tmp_path):
    Image.new("RGB", (60, 40), "orange").save(tmp_path / "a cat.jpg")
    info, out = tmp_path / "i2v.json", tmp_path / "out"
    entry = {"prompt_en": "a cat", "dimension": ["i2v_subject"], "image_name": "a cat.jpg"}
    info.write_text(json.dumps([entry]))
    words = ["eval", "run", "--suite", "vbench_i2v", "--prompts", info, "--method", DRAFT]
    words += ["--model", tiny_image_model, *SMALL, *METRICS, "--out", out]
    result = cli(*words, "--image", tmp_path)
    assert result.exit_code == 0, result.output
    assert (out / "videos" / "dense" / "a cat-0.mp4").is_file()
    result = cli(*words)
    assert result.exit_code == 2 and "give --image DIR" in result.stderr
    result = cli(*words, "--suite", "mini", "--image", tmp_path)
    assert result.exit_code == 2 and "--prompts is for the suites vbench" in result.stderr


BAD = {
    "suite": (["--suite", "mini2"], "There is no suite 'mini2'"),
    "no file": (["--suite", "no.txt"], "Cannot read"),
    "prompts": (["--prompts", "x.json"], "--prompts is for the suites vbench"),
    "images": (["--image", "."], "is a folder: --suite two names no images"),
    "method": (["--method", "radal"], "--method needs a method or preset.*did you mean 'radial'"),
    "field": (["--method", "radial:dekay=1"], "did you mean 'decay'"),
    "twice": (["--method", "draft:dense_steps=1,density=0.250,block=64"], "are the same"),
    "seeds": (["--seeds", "x"], "--seeds must be numbers"),
    "shard": (["--shard", "0/2"], "--shard must be such as 1/8"),
    "metric": (["--metrics", "psnr,pnsr"], "There is no metric 'pnsr'"),
    "size": (["--size", "60x64"], "multiple of 16 pixels"),
    "both": (["--ray", "--shard", "1/2"], "--ray shares the samples out itself"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, cli, words, tmp_path):
    changed, said = BAD[case]
    result = cli(*words, *changed)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1 and "Traceback" not in result.output

    assert re.search(said, result.stderr)


def test_a_report_needs_finished_samples(cli, tmp_path):
    result = cli("eval", "report", tmp_path)
    assert result.exit_code == 2 and "is no folder of `vdit-sparse eval run`" in result.stderr


def test_pictures_of_a_difference(tmp_path):
    one = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    assert difference(one, one).eq(128).all()
    assert difference(one, one + 10).eq(168).all() and difference(one, one - 90).eq(0).all()
    with pytest.raises(FileNotFoundError, match="x.mp4 is missing"):
        read_frames(tmp_path / "x.mp4")


@pytest.mark.slow
def test_ray_survives_the_death_of_a_worker(cli, words, tmp_path):
    pytest.importorskip("ray", reason="ray is not installed: pip install 'vdit-sparse[cluster]'")
    out, killed = tmp_path / "out", []

    def kill():
        file = out / "rows" / "ray-1.jsonl"
        while not killed:
            time.sleep(0.05)
            if file.exists() and file.read_text().count("\n") >= 1:
                killed.append(json.loads(file.read_text().splitlines()[0])["process"])
                os.kill(killed[0], signal.SIGKILL)

    watcher = threading.Thread(target=kill, daemon=True)
    watcher.start()
    result = cli(*words, "--seeds", "0-3", "--ray", "--ray-workers", 2)
    assert result.exit_code == 0, result.output
    watcher.join(10)
    assert killed and "16 of 16 samples" in result.stdout
    lines = [line for file in (out / "rows").iterdir() for line in file.open()]
    rows = read_rows(out)
    assert len(rows) == len(lines) == 16
    by_worker = {row["worker"]: row["process"] for row in rows}
    # The third takes the place of the first; which of them makes the rest is a matter of time.
    assert by_worker["ray-1"] == killed[0]
    assert len(by_worker) > 1 and set(by_worker) <= {"ray-1", "ray-2", "ray-3"}


def test_ray_is_asked_for_only_where_it_is_used(cli, words, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    result = cli(*words, "--ray")
    assert result.exit_code == 2 and "pip install 'vdit-sparse[cluster]'" in result.stderr
