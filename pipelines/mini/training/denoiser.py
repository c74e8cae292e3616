"""Stage `denoiser`: transformer and text encoder, trained together by flow matching."""

import random
import time

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from vdit_sparse.pipelines.mini.training.attention_speed import fastest_attention
from vdit_sparse.pipelines.mini.training.autoencoder import mixed_precision
from vdit_sparse.pipelines.mini.training.batches import Batch, Batches, Kind, LatentLibrary
from vdit_sparse.pipelines.mini.training.checkpoints import Checkpoints
from vdit_sparse.pipelines.mini.training.clips import ClipShape
from vdit_sparse.pipelines.mini.training.curriculum import DenoiserSettings, parse_stages
from vdit_sparse.pipelines.mini.training.fused_attention import fuse_attention
from vdit_sparse.pipelines.mini.training.models import (
    HEAD_DIM,
    Sizes,
    build_text_encoder,
    build_transformer,
)
from vdit_sparse.pipelines.mini.training.pacing import (
    Meter,
    Optimizers,
    Pace,
    TimedAverage,
    report,
    stopping,
)

WARM_UP = 100


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
    """Trains one stage after the other, saving after each; returns the mean losses on the way.

    Args:
        shape: size of the clips where `settings.stages` is empty, and the device.
        sizes: of the networks.
        settings: options, and with `stages` a whole curriculum.
        checkpoints: has the autoencoder, gets the denoiser.
        resume: go on from the denoiser's checkpoint, optimizers and average included.
    """
    start, stages = time.perf_counter(), parse_stages(shape, settings)
    run = _Run(sizes, settings, shape.device)
    if resume:
        run.restore(checkpoints.load("denoiser"))
    library = LatentLibrary(checkpoints, sizes, shape.device)
    losses = []
    for place, stage in stages:
        if stopping():
            break
        report(f"stage {place}: {stage}")
        losses += _train_stage(run, Batches(library, place, stage), stage, start)
        checkpoints.save("denoiser", run.state())
        start = time.perf_counter()
    return losses


class _Run:
    """All that outlives a stage: the networks, their average, the optimizers, the counts."""

    def __init__(self, sizes: Sizes, settings: DenoiserSettings, device: str) -> None:
        self.model = Denoiser(sizes).to(device)
        self.device, self.heads = device, sizes.heads
        self.average = TimedAverage(self.model, settings.average_seconds)
        self.optimizers = _optimizers(self.model, settings)
        self.step = 0
        self.compiled = settings.compiled
        if settings.fused:
            fuse_attention(self.model.transformer)
        if settings.compiled:
            compile_blocks(self.model.transformer)

    def loss(self, batch: Batch) -> Tensor:
        with mixed_precision(self.device):
            return flow_loss(
                self.model, batch.latents, batch.tokens, (batch.shift, batch.pad_length)
            )

    def compile(self, kinds: list[Kind]) -> None:
        """Runs one step of every shape, without learning from it, before the clock starts."""
        dice = random.Random(0)
        for kind in kinds if self.compiled and not stopping() else ():
            start = time.perf_counter()
            self.loss(kind.draw(dice)).backward()
            self.model.zero_grad(set_to_none=True)
            if self.device.startswith("cuda"):
                torch.cuda.synchronize()
            report(f"first step of {kind.shape}: {time.perf_counter() - start:.1f} s")

    def state(self) -> dict:
        average = self.average.module
        return {
            "transformer": self.model.transformer.state_dict(),
            "text_encoder": self.model.text_encoder.state_dict(),
            "transformer_average": average.transformer.state_dict(),
            "text_encoder_average": average.text_encoder.state_dict(),
            "optimizers": self.optimizers.state(),
            "step": self.step,
            "trained": self.average.trained,
        }

    def restore(self, state: dict) -> None:
        average = self.average.module
        self.model.transformer.load_state_dict(state["transformer"])
        self.model.text_encoder.load_state_dict(state["text_encoder"])
        average.transformer.load_state_dict(state["transformer_average"])
        average.text_encoder.load_state_dict(state["text_encoder_average"])
        if "optimizers" in state:
            self.optimizers.load(state["optimizers"])
        self.step, self.average.trained = state["step"], state.get("trained", 0.0)
        report(f"resumed the denoiser at step {self.step}, {self.average.trained:.0f} s")


def _train_stage(
    run: _Run, batches: Batches, settings: DenoiserSettings, start: float
) -> list[float]:
    with_attention(run.model.transformer, _choose_attention(batches.clips, run, settings))
    run.compile(batches.kinds())
    pace = Pace(
        settings.seconds - (time.perf_counter() - start),
        warm_up=WARM_UP if run.step < WARM_UP else WARM_UP // 4,
        peak=settings.peak,
        final=settings.final,
    )
    # Images, clips and long clips have losses of their own: a mean over all would follow the mix.
    meters = {
        kind: Meter(f"denoiser, {kind.frames} latent frames,", run.device)
        for kind in batches.kinds()
    }
    dice = random.Random(run.step)
    first, before = run.step, run.average.trained
    while pace.fraction() < 1 or (run.step == first and not stopping()):
        kind = batches.choose(dice, pace.fraction())
        batch = kind.draw(dice)
        loss = run.loss(batch)
        run.optimizers.step(loss, pace.factor(run.step - first))
        run.average.update(run.model, before + pace.elapsed())
        run.step += 1
        meters[kind].add(loss, len(batch.latents), run.step)
    for meter in meters.values():
        meter.flush(run.step)
    return [loss for meter in meters.values() for loss in meter.losses]


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


def _choose_attention(kind: Kind, run: _Run, settings: DenoiserSettings) -> str:
    if settings.attention != "fastest":
        return settings.attention
    batch, _, frames, height, width = kind.shape
    tokens = frames * (height // 2) * (width // 2)
    return fastest_attention((batch, tokens, run.heads, HEAD_DIM), run.device)


def _optimizers(model: Denoiser, settings: DenoiserSettings) -> Optimizers:
    matrices = [p for p in model.transformer.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return Optimizers(
        matrices, others, settings.rate, adamw_rate=settings.adamw_rate, muon_decay=0.02
    )
