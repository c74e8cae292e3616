"""`mini-fast`: the few-step student loads as a model of its own name."""

import json

import pytest
import torch
from typer.testing import CliRunner

from vdit_sparse import load_pipeline
from vdit_sparse.app.cli import app
from vdit_sparse.app.demo import models
from vdit_sparse.app.demo.limits import Studio
from vdit_sparse.pipelines import load
from vdit_sparse.pipelines.few_step import load_few_step
from vdit_sparse.pipelines.mini.training.lora import factors
from vdit_sparse.pipelines.mini.training.trajectories import Times


def test_the_pipeline_visits_the_student_times_with_one_forward_each(bundled):
    pipe = load_pipeline("mini-fast", dtype=torch.float32, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    calls = []

    def record(module, arguments, named, output):
        calls.append((named["hidden_states"], named["timestep"], output[0]))

    pipe.transformer.register_forward_hook(record, with_kwargs=True)
    noise = torch.randn(1, 8, 2, 4, 8)
    found = pipe("a red fox", latents=noise, output_type="latent").frames
    times = Times.of(6, 3.0, "cpu")
    assert torch.stack([timestep for _, timestep, _ in calls])[:, 0].equal(times.timesteps.long())
    state = noise
    for index, (seen, _, velocity) in enumerate(calls):
        torch.testing.assert_close(seen, state, rtol=1e-4, atol=1e-4)
        state = state - (times.sigmas[index] - times.sigmas[index + 1]) * velocity
    torch.testing.assert_close(found, state, rtol=1e-4, atol=1e-4)


def test_mini_fast_is_the_bundled_model_with_the_student_merged(bundled, trained):
    fast, full = (load_pipeline(n, dtype=torch.float32, device="cpu") for n in ("mini-fast", None))
    assert fast.generation == {**full.generation, "num_inference_steps": 6, "guidance_scale": 1.0}
    assert load.defaults(fast)["fps"] == 10
    name = "blocks.1.attn1.to_q"
    up, down = factors(trained.load("distill")["average"])[name]
    difference = (
        fast.transformer.get_submodule(name).weight - full.transformer.get_submodule(name).weight
    )
    expected = up @ down
    assert expected.norm() > 0
    assert (difference - expected).norm() < 0.02 * expected.norm()


def test_the_weights_load_in_bf16_too(bundled):
    pipe = load_pipeline("mini-fast", dtype=torch.bfloat16, device="cpu")
    assert pipe.transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert pipe.scheduler.config.solver_order == 1


def test_missing_weights_say_what_to_do(bundled, tmp_path, monkeypatch):
    pipe = load_pipeline(dtype=torch.float32, device="cpu")
    with pytest.raises(FileNotFoundError, match="few-step weights are not there.*'distill'"):
        load_few_step(pipe, tmp_path)


def test_weights_of_another_transformer_are_refused(bundled):
    pipe = load_pipeline(dtype=torch.float32, device="cpu")
    with torch.no_grad():
        pipe.transformer.proj_out.bias += 0.1
    before = pipe.transformer.blocks[0].ffn.net[2].weight.clone()
    with pytest.raises(ValueError, match=r"made for other weights.*Distil this transformer"):
        load_few_step(pipe, bundled)
    assert pipe.transformer.blocks[0].ffn.net[2].weight.equal(before)
    pipe.transformer.blocks[0].ffn.net[2] = torch.nn.Linear(95, 64)
    with pytest.raises(ValueError, match=r"of \(64, 96\), this one \(64, 95\)"):
        load_few_step(pipe, bundled)


def test_the_studio_offers_mini_fast_with_its_own_defaults(bundled, tmp_path, monkeypatch):
    studio = Studio(tmp_path)
    monkeypatch.setattr(models, "bundled_model", lambda: bundled)
    assert models.offered(studio) == ["bundled", "mini-fast"]
    assert models.resolve("mini-fast", studio) == "mini-fast"
    defaults = models.known("mini-fast").defaults
    assert (defaults["num_inference_steps"], defaults["guidance_scale"]) == (6, 1.0)
    assert defaults["num_frames"] == 5 and models.known(None).defaults["guidance_scale"] == 4.0


def test_the_command_line_takes_mini_fast(bundled, tmp_path, monkeypatch):
    words = ["generate", "--model", "mini-fast", "--prompt", "a fox", "--method", "dense"]
    words += ["--device", "cpu", "--dtype", "fp32"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "made")])
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "made" / "report.json").read_text())
    assert report["model"]["name"] == "mini-fast"
    settings = report["settings"]
    assert (settings["num_inference_steps"], settings["guidance_scale"]) == (6, 1.0)
    refused = CliRunner().invoke(app, [*words, "--size", "30x64", "--out", str(tmp_path / "no")])
    assert refused.exit_code == 2 and "nearest" in refused.stderr
    monkeypatch.setattr("vdit_sparse.pipelines.few_step.FOLDER", "nowhere")
    missing = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "none")])
    assert missing.exit_code == 2
    assert "Cannot load mini-fast: The few-step weights are not there" in missing.stderr
