"""Stage `distill`: a LoRA with which the denoiser answers in few steps and without guidance."""

import copy
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from vdit_sparse.pipelines.few_step import save_few_step
from vdit_sparse.pipelines.mini.training.attention_speed import fastest_attention
from vdit_sparse.pipelines.mini.training.autoencoder import mixed_precision
from vdit_sparse.pipelines.mini.training.checkpoints import (
    Checkpoints,
    load_autoencoder,
    load_tokenizer,
)
from vdit_sparse.pipelines.mini.training.clips import SEEDS, ClipShape, Limit
from vdit_sparse.pipelines.mini.training.denoiser import Denoiser, compile_blocks, with_attention
from vdit_sparse.pipelines.mini.training.latents import LatentSet, cache_latents
from vdit_sparse.pipelines.mini.training.lora import add_lora, factors, lora_state
from vdit_sparse.pipelines.mini.training.models import HEAD_DIM, Sizes
from vdit_sparse.pipelines.mini.training.pacing import Average, Meter, Pace, report
from vdit_sparse.pipelines.mini.training.trajectories import (
    Teacher,
    Times,
    Trajectories,
    build_few_step_scheduler,
    predict,
)

PHRASINGS = 8


@dataclass(frozen=True)
class DistillSettings:
    """How the few-step student is trained.

    Attributes:
        seconds: the whole stage, rendering and compiling included.
        render_seconds: at most this long for rendering and encoding.
        clips: clips to render and encode at most.
        batch: trajectories trained on at once.
        steps: the student's sampling steps, each one forward.
        teacher_steps: midpoint steps of the teacher within one of the student's, each two guided
            evaluations.
        guidance: the teacher's classifier-free guidance scale.
        shift: of the student's times, the scheduler's `flow_shift`.
        rank: of the LoRA; 8 makes 0.8 MB at the released sizes, and the 64 MB of the model's folder
            leave no room for much more.
        rate: AdamW's learning rate.
        data_share: of the trajectories, begun at a clip with noise instead of at noise alone.
        student_share: of the moves along a trajectory, taken by the student instead of the teacher.
        final: learning-rate factor at the end.
        compiled: compile the blocks of both transformers.
        attention: diffusers' backend for self-attention, or "fastest" to time them first.
    """

    seconds: float = 150.0
    render_seconds: float = 15.0
    clips: int = 2000
    batch: int = 32
    steps: int = 6
    teacher_steps: int = 2
    guidance: float = 4.0
    shift: float = 3.0
    rank: int = 8
    rate: float = 2e-3
    data_share: float = 0.25
    student_share: float = 0.5
    final: float = 0.05
    compiled: bool = True
    attention: str = "fastest"


def train_student(
    shape: ClipShape,
    sizes: Sizes,
    settings: DistillSettings,
    checkpoints: Checkpoints,
    resume: bool = False,
) -> list[float]:
    """Trains the LoRA and saves it; returns the mean losses on the way.

    The student learns the mean velocity of the guided teacher from one of its own times to the
    next: progressive distillation (arXiv 2202.00512) in one go, with the guidance distilled into it
    (arXiv 2210.03142). The loss is the mean squared error of the velocity, all times alike.
    """
    start = time.perf_counter()
    data = _cached_clips(shape, sizes, settings, checkpoints)
    model = load_denoiser(checkpoints, sizes).to(shape.device)
    student = copy.deepcopy(model.transformer)
    add_lora(student, settings.rank)
    average = Average(student, decay=0.99)
    optimizer = _optimizer(student, settings.rate)
    step = _restore(checkpoints, student, average, optimizer) if resume else 0
    _speed_up((model.transformer, student), data, sizes, settings)
    times = Times.of(settings.steps, settings.shift, shape.device)
    empty = _states(model, data.empty[None])
    teacher = Teacher(model.transformer, empty, settings.guidance, settings.teacher_steps)
    shares = (settings.data_share, settings.student_share)
    trajectories = Trajectories(data, times.sigmas, settings.batch, shares)
    pace = Pace(settings.seconds - (time.perf_counter() - start), warm_up=20, final=settings.final)
    meter, first = Meter("distill", shape.device), step
    while pace.fraction() < 1 or step == first:
        with mixed_precision(shape.device):
            text = _states(model, trajectories.tokens)
            loss = distill_step(student, teacher, trajectories, times, text)
        _update(optimizer, loss, settings.rate * pace.factor(step - first))
        average.update(student, step)
        step += 1
        meter.add(loss, settings.batch, step)
    meter.flush(step)
    checkpoints.save("distill", _state(student, average, optimizer, step, settings))
    return meter.losses


def distill_step(
    student: nn.Module, teacher: Teacher, trajectories: Trajectories, times: Times, text: Tensor
) -> Tensor:
    """Returns the loss of one student step of every trajectory, and moves them on.

    The student's answer, which the loss needs anyway, is also the move.
    """
    target = teacher.mean_velocity(trajectories.latents, *trajectories.span(), text)
    timestep = times.timesteps[trajectories.index]
    # With a gradient at its input too, the first block needs no compilation of its own.
    latents = trajectories.latents.detach().requires_grad_()
    velocity = predict(student, latents, timestep, text)
    trajectories.advance(velocity.detach(), target)
    return F.mse_loss(velocity, target)


def load_denoiser(checkpoints: Checkpoints, sizes: Sizes) -> Denoiser:
    """Builds the averaged transformer and text encoder, frozen."""
    state, model = checkpoints.load("denoiser"), Denoiser(sizes)
    model.transformer.load_state_dict(state["transformer_average"])
    model.text_encoder.load_state_dict(state["text_encoder_average"])
    return model.eval().requires_grad_(False)


def export_student(checkpoints: Checkpoints, folder: Path) -> int:
    """Writes the averaged LoRA and its sampler beside an exported pipeline; returns its bytes."""
    state = checkpoints.load("distill")
    scheduler = build_few_step_scheduler(state["steps"], state["shift"])
    generation = {"num_inference_steps": state["steps"], "guidance_scale": 1.0}
    size = save_few_step(folder, factors(state["average"]), state["base"], scheduler, generation)
    report(f"wrote the few-step LoRA into {folder}: {size / 1e6:.2f} MB")
    return size


def _cached_clips(
    shape: ClipShape, sizes: Sizes, settings: DistillSettings, checkpoints: Checkpoints
) -> LatentSet:
    vae = load_autoencoder(checkpoints, sizes).to(shape.device)
    tokenizer = load_tokenizer(checkpoints.tokenizer)
    limit = Limit(settings.clips, settings.render_seconds)
    # The denoiser's own clips: what is distilled is its knowledge, not more data.
    seed = SEEDS["denoiser"] + 1000 * shape.height
    return cache_latents(vae, tokenizer, shape, limit, seed, PHRASINGS)


@torch.no_grad()
def _states(model: Denoiser, tokens: Tensor) -> Tensor:
    return model.encode_text(tokens)


def _speed_up(
    transformers: tuple[WanTransformer3DModel, ...],
    data: LatentSet,
    sizes: Sizes,
    settings: DistillSettings,
) -> None:
    attention = settings.attention
    if attention == "fastest":
        frames, height, width = data.latents.shape[2:]
        tokens = frames * (height // 2) * (width // 2)
        shape = (settings.batch, tokens, sizes.heads, HEAD_DIM)
        attention = fastest_attention(shape, str(data.latents.device))
    for transformer in transformers:
        if settings.compiled:
            compile_blocks(transformer)
        with_attention(transformer, attention)


def _optimizer(student: nn.Module, rate: float) -> torch.optim.AdamW:
    trained = [p for p in student.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=trained[0].is_cuda
    )


def _update(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    (group,) = optimizer.param_groups
    loss.backward()
    torch.nn.utils.clip_grad_norm_(group["params"], 1.0, foreach=True)
    group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _state(student, average: Average, optimizer, step: int, settings: DistillSettings) -> dict:
    return {
        "lora": lora_state(student),
        "average": lora_state(average.module),
        "base": student.proj_out.bias.detach(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "steps": settings.steps,
        "shift": settings.shift,
    }


def _restore(checkpoints: Checkpoints, student, average: Average, optimizer) -> int:
    state = checkpoints.load("distill")
    student.load_state_dict(state["lora"], strict=False)
    average.module.load_state_dict(state["average"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    report(f"resumed the student at step {state['step']}")
    return state["step"]
