"""The few-step student: it learns, its times are the sampler's, and it loads as `mini-fast`."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter
from typer.testing import CliRunner

from tests.pipelines.mini.toys import SHAPE, randomise
from vdit_sparse import load_pipeline
from vdit_sparse.app import checks
from vdit_sparse.app.cli import app
from vdit_sparse.app.demo import models
from vdit_sparse.app.demo.limits import Studio
from vdit_sparse.pipelines import load
from vdit_sparse.pipelines.few_step import FOLDER, WEIGHTS, load_few_step, merge, quantise
from vdit_sparse.pipelines.mini.training import train
from vdit_sparse.pipelines.mini.training.checkpoints import Checkpoints
from vdit_sparse.pipelines.mini.training.denoiser import Denoiser, compile_blocks
from vdit_sparse.pipelines.mini.training.distill import (
    DistillSettings,
    distill_step,
    train_student,
)
from vdit_sparse.pipelines.mini.training.latents import LatentSet
from vdit_sparse.pipelines.mini.training.lora import add_lora, factors, lora_layers, lora_state
from vdit_sparse.pipelines.mini.training.models import (
    RELEASED,
    TINY,
    build_autoencoder,
    build_transformer,
)
from vdit_sparse.pipelines.mini.training.trajectories import (
    Teacher,
    Times,
    Trajectories,
    predict,
)

SIZE = ["--height", "32", "--width", "64", "--frames", "5"]
CALL = {"height": 32, "width": 64, "num_frames": 5, "output_type": "latent"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, one_thread):
    """Checkpoints and export of a random model, distilled by the command line."""
    torch.manual_seed(0)
    checkpoints = Checkpoints(tmp_path_factory.mktemp("distilled"))
    vae, model = build_autoencoder(TINY), randomise(Denoiser(TINY), 0.05)
    checkpoints.save(
        "autoencoder",
        {"average": vae.state_dict(), "mean": torch.zeros(8), "std": torch.ones(8)},
    )
    checkpoints.save(
        "denoiser",
        {
            "transformer_average": model.transformer.state_dict(),
            "text_encoder_average": model.text_encoder.state_dict(),
        },
    )
    common = ["--folder", str(checkpoints.folder), "--sizes", "tiny"]
    stage = ["distill", *common, *SIZE, "--device", "cpu", "--batch", "2", "--clips", "2"]
    stage += ["--seconds", "0.5", "--no-compiled"]
    train.main(["export", *common, "then", *stage, "then", *stage, "--resume"])
    generation = {**CALL, "num_inference_steps": 9, "guidance_scale": 4.0, "fps": 10}
    generation |= {"output_type": "np", "max_sequence_length": 64}
    (checkpoints.pipeline / "generation.json").write_text(json.dumps(generation))
    return checkpoints


@pytest.fixture
def bundled(trained, monkeypatch):
    """The distilled model in the place of the bundled one."""
    monkeypatch.setattr(load, "MINI", trained.pipeline)
    monkeypatch.setattr(checks, "bundled_model", lambda: trained.pipeline)
    return trained.pipeline


def clips(device, count=4) -> LatentSet:
    tokens = torch.randint(3, 900, (count, 1, 64))
    data = LatentSet(torch.randn(count, 8, 2, 4, 8).half(), tokens, torch.zeros(64).long())
    return LatentSet(data.latents.to(device), data.tokens.to(device), data.empty.to(device))


def lessons(device, steps=4, batch=8):
    """A random model with its teacher, a fresh student, times and trajectories."""
    model = randomise(Denoiser(TINY), 0.05).requires_grad_(False).to(device)
    student = copy.deepcopy(model.transformer)
    add_lora(student, 4)
    data, times = clips(device), Times.of(steps, 3.0, str(device))
    teacher = Teacher(model.transformer, model.encode_text(data.empty[None]), 4.0, 2)
    return model, student, teacher, times, Trajectories(data, times.sigmas, batch, (0.25, 0.5))


def changed(student, std=0.1):
    for layer in lora_layers(student).values():
        torch.nn.init.normal_(layer.up, std=std)
    return student


def inputs(device="cpu"):
    parts = torch.randn(2, 8, 2, 4, 8), torch.tensor([900.0, 300.0]), torch.randn(2, 64, 32)
    return [part.to(device) for part in parts]


def test_the_student_comes_nearer_to_the_teacher(device):
    model, student, teacher, times, trajectories = lessons(device)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=4e-3)
    text = model.encode_text(trajectories.tokens)
    fixed = [trajectories.latents, times.timesteps[trajectories.index], text]
    target = teacher.mean_velocity(fixed[0], *trajectories.span(), text)

    @torch.no_grad()
    def error():
        return (predict(student, *fixed) - target).square().mean().item()

    before = error()
    for _ in range(25):
        text = model.encode_text(trajectories.tokens)
        distill_step(student, teacher, trajectories, times, text).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert error() < 0.4 * before


def test_a_fresh_lora_changes_nothing_and_only_it_is_trained(device):
    model, student, *_ = lessons(device)
    arguments = inputs(device)
    torch.testing.assert_close(predict(student, *arguments), predict(model.transformer, *arguments))
    trained_names = {name for name, p in student.named_parameters() if p.requires_grad}
    assert trained_names == set(lora_state(student))
    linear = [m for m in model.transformer.modules() if isinstance(m, torch.nn.Linear)]
    assert len(lora_layers(student)) == len(linear)


def test_merged_equals_unmerged(device):
    model, student, *_ = lessons(device)
    stored = {"base.proj_out.bias": model.transformer.proj_out.bias.cpu()}
    for name, (up, down) in factors(lora_state(changed(student))).items():
        parts = quantise(up, down)
        stored |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        # What is compared is the merging: the student gets the stored numbers.
        layer = lora_layers(student)[name]
        layer.up.data = (parts["up"].T * parts["scale"]).to(device)
        layer.down.data = parts["down"].float().to(device)
    arguments = inputs(device)
    expected = predict(student, *arguments)
    before = predict(model.transformer, *arguments)
    merge(model.transformer, stored)
    torch.testing.assert_close(predict(model.transformer, *arguments), expected)
    assert (before - expected).abs().max() > 1e-2


def test_eight_bits_keep_the_product():
    up, down = torch.randn(48, 4), torch.randn(4, 30) * torch.tensor([[1.0], [9], [1e-4], [0]])
    parts = quantise(up, down)
    found = (parts["up"].T.double() * parts["scale"]) @ parts["down"].double()
    expected = up.double() @ down.double()
    assert (found - expected).norm() < 0.01 * expected.norm()
    assert parts["up"].dtype == parts["down"].dtype == torch.int8
    for tensor in quantise(torch.zeros(3, 2), torch.randn(2, 5)).values():
        assert tensor.isfinite().all()


def test_the_file_of_the_released_size_stays_below_a_megabyte():
    with torch.device("meta"):
        transformer = build_transformer(RELEASED)
        rank = DistillSettings().rank
        add_lora(transformer, rank)
    layers = lora_layers(transformer).values()
    stored = sum(layer.up.numel() + layer.down.numel() + 4 * rank for layer in layers)
    headers = 300 * len(layers)
    assert stored + headers < 1e6


def test_the_file_holds_little_more_than_its_bytes(trained):
    file = trained.pipeline / FOLDER / WEIGHTS
    stored = sum(tensor.nbytes for tensor in load_file(file).values())
    assert stored < file.stat().st_size < stored + 300 * len(load_file(file)) // 3


class Linear(torch.nn.Module):
    """A velocity of `x` times the mean of the text: the flow is an exponential."""

    def forward(self, hidden_states, timestep, encoder_hidden_states, return_dict):
        return (hidden_states * encoder_hidden_states.mean((1, 2)).view(-1, 1, 1, 1, 1),)


def test_the_teacher_follows_the_guided_flow(device):
    text, empty = torch.full((3, 64, 32), 0.75), torch.full((1, 64, 32), 0.5)
    latents = torch.randn(3, 8, 2, 4, 8)
    start, end = torch.tensor([1.0, 0.9, 0.4]), torch.tensor([0.8, 0.5, 0.0])
    width = (start - end).double().view(-1, 1, 1, 1, 1)
    rate = 0.5 + 4 * (0.75 - 0.5)
    expected = latents.double() * (1 - torch.exp(-rate * width)) / width

    def error(steps):
        teacher = Teacher(Linear(), empty.to(device), 4.0, steps)
        moved = (x.to(device) for x in (latents, start, end, text))
        return (teacher.mean_velocity(*moved).cpu().double() - expected).abs().max().item()

    assert error(8) < 5e-3
    # The midpoint method is of second order.
    assert error(4) == pytest.approx(error(2) / 4, rel=0.3)


def test_trajectories_run_from_noise_to_the_end_and_start_anew(device):
    data, times = clips(device), Times.of(3, 3.0, str(device))
    flow = Trajectories(data, times.sigmas, 64, (0.0, 1.0))
    assert set(flow.index.tolist()) == {0, 1, 2}
    before = flow.latents, flow.index, flow.tokens
    start, end = flow.span()
    student = torch.randn_like(flow.latents)
    flow.advance(student, torch.full_like(student, torch.nan))
    going = before[1] < 2
    arrived = before[0] - (start - end).view(-1, 1, 1, 1, 1) * student
    torch.testing.assert_close(flow.latents[going], arrived[going])
    assert flow.index[going].equal(before[1][going] + 1) and not flow.index[~going].any()
    assert flow.tokens[going].equal(before[2][going])
    # The new ones are noise alone.
    new = flow.latents[~going]
    assert new.isfinite().all() and abs(new.std().item() - 1) < 0.1
    nobody = Trajectories(data, times.sigmas, 64, (1.0, 0.0))
    nobody.advance(torch.full_like(student, torch.nan), student)
    assert nobody.latents.isfinite().all() and len(set(nobody.index.tolist())) == 3


def test_both_moves_are_taken(device):
    data, times = clips(device), Times.of(2, 3.0, str(device))
    flow = Trajectories(data, times.sigmas, 64, (1.0, 0.5))
    flow.index = torch.zeros_like(flow.index)
    flow.latents = torch.zeros_like(flow.latents)
    ones = torch.ones_like(flow.latents)
    flow.advance(-ones, ones)
    signs = flow.latents.flatten(1).sign()
    assert signs.eq(signs[:, :1]).all() and set(signs[:, 0].tolist()) == {-1.0, 1.0}


def test_distilling_compiles_each_transformer_once():
    torch._dynamo.reset()
    counter = CompileCounter()
    model, student, teacher, times, trajectories = lessons("cpu", batch=2)
    for transformer in (model.transformer, student):
        compile_blocks(transformer, backend=counter)
    for _ in range(2):
        text = model.encode_text(trajectories.tokens)
        distill_step(student, teacher, trajectories, times, text).backward()
    assert counter.frame_count == 2
    torch._dynamo.reset()


def test_the_stage_counts_its_steps_and_resumes(trained):
    state = trained.load("distill")
    assert state["step"] >= 2 and state["steps"] == 6
    assert state["average"].keys() == state["lora"].keys()
    assert any(tensor.count_nonzero() for name, tensor in state["average"].items() if "up" in name)


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


@pytest.mark.gpu
def test_the_compiled_stage_runs_on_a_gpu(trained, tmp_path):
    checkpoints = Checkpoints(tmp_path, trained.tokenizer)
    for stage in ("autoencoder", "denoiser"):
        checkpoints.save(stage, trained.load(stage))
    shape = type(SHAPE)(SHAPE.height, SHAPE.width, SHAPE.frames, "cuda")
    settings = DistillSettings(seconds=1.0, clips=4, batch=2)
    losses = train_student(shape, TINY, settings, checkpoints)
    assert all(0 <= loss < 100 for loss in losses)
    assert checkpoints.load("distill")["step"] >= 1
