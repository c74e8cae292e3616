"""Stage `denoiser`: transformer and text encoder, trained together by flow matching."""

import random
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from vdit_sparse.pipelines.mini.training.attention_speed import fastest_attention
from vdit_sparse.pipelines.mini.training.autoencoder import mixed_precision
from vdit_sparse.pipelines.mini.training.checkpoints import (
    Checkpoints,
    load_autoencoder,
    load_tokenizer,
)
from vdit_sparse.pipelines.mini.training.clips import SEEDS, ClipShape, Limit
from vdit_sparse.pipelines.mini.training.latents import LatentSet, cache_latents
from vdit_sparse.pipelines.mini.training.models import (
    HEAD_DIM,
    Sizes,
    build_text_encoder,
    build_transformer,
)
from vdit_sparse.pipelines.mini.training.pacing import Average, Meter, Optimizers, Pace, report

DROP_CAPTION = 0.1
PAD_LENGTHS, PAD_SHARES = (64, 128, 226, 512), (0.7, 0.1, 0.1, 0.1)
LONG_FROM = 2 / 3
LONG_SHARE = 0.06


@dataclass(frozen=True)
class DenoiserSettings:
    """How one resolution is trained; see README.md for the released recipe.

    Attributes:
        seconds: the whole stage, rendering and compiling included.
        render_seconds: at most this long for rendering and encoding.
        clips: clips to render and encode at most.
        long_clips: clips of twice the length (`2 frames - 1`), 6 % of the batches in the last
            third of the time; 0 leaves them out.
        batch: clips a step; a step of long clips has three eighths of it.
        shift: of the noise levels, `t' = s t / (1 + (s-1) t)`; larger pictures need more noise.
        peak: largest learning-rate factor.
        final: learning-rate factor at the end.
        compiled: compile the transformer's blocks.
        attention: diffusers' backend for self-attention, or "fastest" to time them first.
    """

    seconds: float = 430.0
    render_seconds: float = 75.0
    clips: int = 20_000
    long_clips: int = 0
    batch: int = 64
    shift: float = 3.0
    peak: float = 1.0
    final: float = 0.02
    compiled: bool = True
    attention: str = "fastest"


class Denoiser(nn.Module):
    """Transformer and text encoder as one module: noisy latents and tokens to a velocity."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.transformer: WanTransformer3DModel = build_transformer(sizes)
        self.text_encoder: UMT5EncoderModel = build_text_encoder(sizes)

    def forward(self, noisy: Tensor, sigma: Tensor, tokens: Tensor, pad_length: int) -> Tensor:
        """Predicts `noise - latents`.

        Args:
            noisy: `[batch, channels, frames, height, width]`, `(1 - sigma) x + sigma noise`.
            sigma: `[batch]` in [0, 1].
            tokens: `[batch, 64]` int64.
            pad_length: text length that the transformer sees. Like `WanPipeline`, the rest is
                zero vectors that cross-attention does not mask.
        """
        text = self.encode_text(tokens)
        text = F.pad(text, (0, 0, 0, pad_length - text.shape[1]))
        return self.transformer(
            hidden_states=noisy,
            timestep=sigma * 1000,
            encoder_hidden_states=text,
            return_dict=False,
        )[0]

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Returns text states `[batch, 64, text_dim]`, zero at padded places."""
        mask = tokens != self.text_encoder.config.pad_token_id
        states = self.text_encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        return states * mask[..., None]


def train_denoiser(
    shape: ClipShape,
    sizes: Sizes,
    settings: DenoiserSettings,
    checkpoints: Checkpoints,
    resume: bool = False,
) -> list[float]:
    """Trains at one resolution and saves; returns the mean losses on the way."""
    start = time.perf_counter()
    sets = _latent_sets(shape, sizes, settings, checkpoints)
    model = Denoiser(sizes).to(shape.device)
    average = Average(model, decay=0.999)
    optimizers = _optimizers(model)
    step = _restore(checkpoints, model, average, optimizers) if resume else 0
    attention = _choose_attention(sets[0], sizes, settings, shape)
    if settings.compiled:
        compile_blocks(model.transformer)
    with_attention(model.transformer, attention)
    pace = Pace(
        settings.seconds - (time.perf_counter() - start),
        warm_up=100,
        peak=settings.peak,
        final=settings.final,
    )
    meter, dice, first = Meter("denoiser", shape.device), random.Random(step), step
    while pace.fraction() < 1 or step == first:
        latents, tokens = _next_batch(sets, settings, dice, pace.fraction())
        (pad_length,) = dice.choices(PAD_LENGTHS, PAD_SHARES)
        with mixed_precision(shape.device):
            loss = flow_loss(model, latents, tokens, (settings.shift, pad_length))
        optimizers.step(loss, pace.factor(step - first))
        average.update(model, step)
        step += 1
        meter.add(loss, len(latents), step)
    meter.flush(step)
    checkpoints.save("denoiser", _state(model, average, optimizers, step))
    return meter.losses


def flow_loss(
    model: Denoiser, latents: Tensor, tokens: Tensor, setting: tuple[float, int]
) -> Tensor:
    """Returns the mean squared error of the predicted velocity (rectified flow, arXiv 2209.03003).

    The noise level is logit-normal (arXiv 2403.03206, equation 19), then shifted as the sampler
    shifts it (equation 23).

    Args:
        model: the denoiser.
        latents: `[batch, channels, frames, height, width]` float32, normalised.
        tokens: `[batch, 64]`.
        setting: the shift of the noise level, and the padded length of the text.
    """
    shift, pad_length = setting
    sigma = torch.sigmoid(torch.randn(len(latents), device=latents.device))
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    noise = torch.randn_like(latents)
    noisy = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1, 1))
    velocity = model(noisy, sigma, tokens, pad_length)
    return F.mse_loss(velocity.float(), noise - latents)


def compile_blocks(transformer: WanTransformer3DModel, **options: object) -> None:
    """Compiles one block for all, with static shapes but for the length of the text.

    Text is padded to several lengths: marking that one dimension dynamic saves a compilation per
    length, which costs more than the step it speeds up. `options` go to `torch.compile`.
    """
    transformer.condition_embedder.register_forward_hook(_mark_text_length)
    transformer.compile_repeated_blocks(dynamic=False, **options)


def with_attention(transformer: WanTransformer3DModel, backend: str) -> None:
    """Sets diffusers' attention backend of the self-attention layers."""
    for block in transformer.blocks:
        block.attn1.set_attention_backend(backend)


def _mark_text_length(embedder: nn.Module, inputs: tuple, outputs: tuple) -> None:
    torch._dynamo.maybe_mark_dynamic(outputs[2], 1)


def _choose_attention(
    data: LatentSet, sizes: Sizes, settings: DenoiserSettings, shape: ClipShape
) -> str:
    if settings.attention != "fastest":
        return settings.attention
    frames, height, width = data.latents.shape[2:]
    tokens = frames * (height // 2) * (width // 2)
    return fastest_attention((settings.batch, tokens, sizes.heads, HEAD_DIM), shape.device)


def _latent_sets(
    shape: ClipShape, sizes: Sizes, settings: DenoiserSettings, checkpoints: Checkpoints
) -> list[LatentSet]:
    vae = load_autoencoder(checkpoints, sizes).to(shape.device)
    tokenizer = load_tokenizer(checkpoints.tokenizer)
    share = 0.88 if settings.long_clips else 1.0
    limit = Limit(settings.clips, settings.render_seconds * share)
    # Every resolution gets its own clips: two stages then see more of them than one.
    seed = SEEDS["denoiser"] + 1000 * shape.height
    sets = [cache_latents(vae, tokenizer, shape, limit, seed)]
    if settings.long_clips:
        long = ClipShape(shape.height, shape.width, 2 * shape.frames - 1, shape.device)
        limit = Limit(settings.long_clips, settings.render_seconds * (1 - share))
        sets.append(cache_latents(vae, tokenizer, long, limit, seed + 500_000))
    return sets


def _next_batch(
    sets: list[LatentSet], settings: DenoiserSettings, dice: random.Random, fraction: float
) -> tuple[Tensor, Tensor]:
    if len(sets) > 1 and fraction > LONG_FROM and dice.random() < LONG_SHARE:
        return sets[1].draw(max(1, settings.batch * 3 // 8), DROP_CAPTION)
    return sets[0].draw(settings.batch, DROP_CAPTION)


def _optimizers(model: Denoiser) -> Optimizers:
    matrices = [p for p in model.transformer.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return Optimizers(matrices, others, adamw_rate=1.5e-3, muon_decay=0.02)


def _state(model: Denoiser, average: Average, optimizers: Optimizers, step: int) -> dict:
    return {
        "transformer": model.transformer.state_dict(),
        "text_encoder": model.text_encoder.state_dict(),
        "transformer_average": average.module.transformer.state_dict(),
        "text_encoder_average": average.module.text_encoder.state_dict(),
        "optimizers": optimizers.state(),
        "step": step,
    }


def _restore(
    checkpoints: Checkpoints, model: Denoiser, average: Average, optimizers: Optimizers
) -> int:
    state = checkpoints.load("denoiser")
    model.transformer.load_state_dict(state["transformer"])
    model.text_encoder.load_state_dict(state["text_encoder"])
    average.module.transformer.load_state_dict(state["transformer_average"])
    average.module.text_encoder.load_state_dict(state["text_encoder_average"])
    if "optimizers" in state:
        optimizers.load(state["optimizers"])
    report(f"resumed the denoiser at step {state['step']}")
    return state["step"]
