"""The few-step student: it learns, its times are the sampler's, and it loads as `mini-fast`."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter

from tests.pipelines.mini.toys import SHAPE, randomise
from vdit_sparse.pipelines.few_step import FOLDER, WEIGHTS, merge, quantise
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
    build_transformer,
)
from vdit_sparse.pipelines.mini.training.trajectories import (
    Teacher,
    Times,
    Trajectories,
    predict,
)


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
