"""Stage `autoencoder`: video to latents and back, on crops of whole clips."""

import contextlib
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format, convert_conv3d_weight_memory_format

from vdit_sparse.pipelines.mini.training.checkpoints import Checkpoints
from vdit_sparse.pipelines.mini.training.clips import (
    SEEDS,
    ClipShape,
    Limit,
    crops,
    from_bytes,
    render_bytes,
    to_bytes,
)
from vdit_sparse.pipelines.mini.training.models import Sizes, build_autoencoder
from vdit_sparse.pipelines.mini.training.pacing import (
    Meter,
    Optimizers,
    Pace,
    TimedAverage,
    report,
)
from vdit_sparse.pipelines.mini.training.st_lpips import PerceptualDistance
from vdit_sparse.pipelines.mini.training.whole_clip import WholeClip

LONG_EVERY = 8
LONG_FROM = 0.5
PEAK = 255.0


@dataclass(frozen=True)
class AutoencoderSettings:
    """How the autoencoder is trained; the defaults are recipe 2 of README.md on one H200.

    Attributes:
        seconds: the whole stage, rendering included.
        render_seconds: at most this long for rendering.
        clips: clips of `shape.frames` to render and hold in memory (8.6 MB each at full size).
        long_clips: clips of twice the length (`2 frames - 1`), every eighth batch in the second
            half of the time; 0 leaves them out.
        batch: crops a step.
        crop: side of the square crops in pixels, divisible by 16.
        kl_weight: weight of the mean KL divergence to a standard normal. Any weight has its
            optimum at deviations near 1, but 2e-6 pulls too weakly to get there (2 to 6 after
            240 s on an H200). README.md has the trial.
        coarse_weight: weight of the pixels' loss of latents at half their height and width against
            the video at half its size, so that coarse content lies in coarse latents, which a
            denoiser finds first (arXiv 2502.14831; 2502.09509 transforms in place of it).
        decoder_from: from this share of the time on only the decoder learns; 1 for never.
        latent_noise: then each crop's latents get noise of up to this share of their deviation,
            because a denoiser's latents are not exact either.
        perceptual: file of ST-LPIPS weights (`st_lpips.py`); then it joins the decoder's loss.
        perceptual_weight: of ST-LPIPS beside the loss on pixels.
        perceptual_frames: frames of every crop that ST-LPIPS looks at, new ones in every step.
        average_seconds: length of the moving average of the weights.
        channels_last: keep the convolutions' weights and activations channels-last.
        compiled: compile the elementwise part between the convolutions.
    """

    seconds: float = 230.0
    render_seconds: float = 40.0
    clips: int = 1300
    long_clips: int = 96
    batch: int = 32
    crop: int = 80
    kl_weight: float = 1e-3
    coarse_weight: float = 0.25
    decoder_from: float = 0.8
    latent_noise: float = 0.1
    perceptual: str = ""
    perceptual_weight: float = 0.5
    perceptual_frames: int = 8
    average_seconds: float = 15.0
    channels_last: bool = True
    compiled: bool = False


def train_autoencoder(
    shape: ClipShape,
    sizes: Sizes,
    settings: AutoencoderSettings,
    checkpoints: Checkpoints,
    resume: bool = False,
) -> list[float]:
    """Trains, measures the latents, saves; returns the mean losses on the way."""
    start = time.perf_counter()
    vae = build_autoencoder(sizes).to(shape.device)
    if settings.channels_last:
        convert_conv3d_weight_memory_format(vae, torch.channels_last_3d)
        convert_conv2d_weight_memory_format(vae, torch.channels_last)
    average = TimedAverage(vae, settings.average_seconds)
    optimizers = _optimizers(vae)
    step = _restore(checkpoints, vae, average, optimizers) if resume else 0
    first, before = step, average.trained
    objective = _Objective(WholeClip(vae, compiled=settings.compiled), settings, shape.device)
    pools = _render_pools(shape, settings)
    pace = Pace(settings.seconds - (time.perf_counter() - start))
    meter = Meter("autoencoder", shape.device)
    while pace.fraction() < 1 or step == first:
        fraction = pace.fraction()
        video = _next_batch(pools, settings, step if fraction > LONG_FROM else 1)
        with mixed_precision(shape.device):
            loss = objective(video, fraction)
        optimizers.step(loss, pace.factor(step - first))
        average.update(vae, before + pace.elapsed())
        step += 1
        meter.add(loss, len(video), step)
    meter.flush(step)
    mean, std = latent_statistics(WholeClip(average.module), pools[0][:96])
    report("latent deviations", [round(value, 2) for value in std.tolist()])
    state = {"weights": vae.state_dict(), "average": average.module.state_dict(), "step": step}
    state |= {"optimizers": optimizers.state(), "mean": mean.cpu(), "std": std.cpu()}
    checkpoints.save("autoencoder", state | {"trained": average.trained})
    return meter.losses


class _Objective:
    """The loss of a batch: of both halves first, of the decoder alone at the end."""

    def __init__(self, clip: WholeClip, settings: AutoencoderSettings, device: str) -> None:
        self.clip, self.settings, self.perceptual = clip, settings, None
        if settings.perceptual:
            self.perceptual = PerceptualDistance(settings.perceptual).to(device)

    def __call__(self, video: Tensor, fraction: float) -> Tensor:
        if fraction < self.settings.decoder_from:
            return reconstruction_loss(self.clip, video, self.settings)
        return decoder_loss(self.clip, video, self.settings, self.perceptual)


def mixed_precision(device: str) -> contextlib.AbstractContextManager:
    """Returns bf16 autocast on a GPU and plain precision elsewhere."""
    if device.startswith("cuda"):
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


def reconstruction_loss(clip: WholeClip, video: Tensor, settings: AutoencoderSettings) -> Tensor:
    """Returns L1 + 0.5 L2 + 0.5 (L1 of both spatial gradients) + `kl_weight` KL, means all, and
    `coarse_weight` of the first three at half the size.

    Args:
        clip: the autoencoder.
        video: `[batch, 3, frames, height, width]` in [-1, 1].
        settings: kl_weight and coarse_weight count.
    """
    mean, log_variance = clip.encode(video).float().chunk(2, dim=1)
    log_variance = log_variance.clamp(-12, 6)
    latents = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    loss = _pixel_loss(clip.decode(latents).float() - video) + settings.kl_weight * kl
    if not settings.coarse_weight:
        return loss
    coarse = clip.decode(_halved(latents)).float() - _halved(video)
    return loss + settings.coarse_weight * _pixel_loss(coarse)


def _halved(x: Tensor) -> Tensor:
    return F.avg_pool3d(x, (1, 2, 2))


def decoder_loss(
    clip: WholeClip,
    video: Tensor,
    settings: AutoencoderSettings,
    perceptual: PerceptualDistance | None = None,
) -> Tensor:
    """Returns the pixels' loss, and ST-LPIPS if given, of the decoder on disturbed latents.

    No gradient reaches the encoder, so latents that are cached now stay valid.

    Args:
        clip: the autoencoder.
        video: `[batch, 3, frames, height, width]` in [-1, 1].
        settings: latent_noise, perceptual_weight and perceptual_frames count.
        perceptual: ST-LPIPS; None leaves its term out.
    """
    with torch.no_grad():
        latents = clip.encode(video).float().chunk(2, dim=1)[0]
        deviation = latents.std(dim=(0, 2, 3, 4), keepdim=True)
        level = torch.rand(len(video), 1, 1, 1, 1, device=video.device) * settings.latent_noise
        latents = latents + level * deviation * torch.randn_like(latents)
    decoded = clip.decode(latents).float()
    loss = _pixel_loss(decoded - video)
    if perceptual is None:
        return loss
    frames = torch.randperm(video.shape[2], device=video.device)[: settings.perceptual_frames]
    pictures = (x[:, :, frames].transpose(1, 2).flatten(0, 1) for x in (decoded, video))
    return loss + settings.perceptual_weight * perceptual(*pictures).mean()


def _pixel_loss(error: Tensor) -> Tensor:
    # Differences are linear, so the gradients' error is the error's gradient.
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 0.5 * error.square().mean() + 0.5 * edges


@torch.no_grad()
def latent_statistics(clip: WholeClip, clips: Tensor, batch: int = 8) -> tuple[Tensor, Tensor]:
    """Returns mean and deviation per latent channel, `[channels]` each, over uint8 clips."""
    means = []
    for part in clips.split(batch):
        with mixed_precision(str(clips.device)):
            means.append(clip.encode(from_bytes(part)).float().chunk(2, dim=1)[0])
    latents = torch.cat(means).transpose(0, 1).flatten(1)
    return latents.mean(dim=1), latents.std(dim=1)


@torch.no_grad()
def evaluate_autoencoder(vae: AutoencoderKLWan, shape: ClipShape, count: int = 64) -> dict:
    """Measures the reconstruction of held-out clips.

    PSNR is per frame on 8-bit RGB, peak 255, at most 100 dB, on the posterior's mean; then
    averaged over clips.

    Returns:
        `psnr` (mean over all frames), `psnr_worst_index` and `psnr_by_index` (mean per frame
        index), `clips`, `frames`, `height`, `width`.
    """
    clip = WholeClip(vae.to(shape.device))
    originals = render_bytes(shape, Limit(count), SEEDS["held_out"])
    rows = []
    for part in originals.split(4):
        with mixed_precision(shape.device):
            latents = clip.encode(from_bytes(part)).chunk(2, dim=1)[0]
            decoded = clip.decode(latents)
        rows.append(frame_psnr(to_bytes(decoded), part))
    by_index = torch.cat(rows).mean(dim=0)
    return {
        "psnr": round(by_index.mean().item(), 3),
        "psnr_worst_index": round(by_index.min().item(), 3),
        "psnr_by_index": [round(value, 2) for value in by_index.tolist()],
        "clips": count,
        "frames": shape.frames,
        "height": shape.height,
        "width": shape.width,
    }


def frame_psnr(first: Tensor, second: Tensor) -> Tensor:
    """Returns dB `[clips, frames]` between uint8 clips `[clips, 3, frames, height, width]`."""
    error = (first.float() - second.float()).square().mean(dim=(1, 3, 4))
    return (20 * torch.log10(PEAK / error.sqrt())).clamp(max=100.0)


def _optimizers(vae: AutoencoderKLWan) -> Optimizers:
    kernels = [p for p in vae.parameters() if _is_kernel(p)]
    chosen = {id(p) for p in kernels}
    return Optimizers(kernels, [p for p in vae.parameters() if id(p) not in chosen])


def _is_kernel(parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 4 and parameter.shape[0] > 4 and parameter[0].numel() > 1


def _render_pools(shape: ClipShape, settings: AutoencoderSettings) -> list[Tensor]:
    share = 0.8 if settings.long_clips else 1.0
    limit = Limit(settings.clips, settings.render_seconds * share)
    pools = [render_bytes(shape, limit, SEEDS["autoencoder"])]
    if settings.long_clips:
        long = ClipShape(shape.height, shape.width, 2 * shape.frames - 1, shape.device)
        limit = Limit(settings.long_clips, settings.render_seconds * 0.2)
        pools.append(render_bytes(long, limit, SEEDS["autoencoder"] + 500_000))
    return pools


def _next_batch(pools: list[Tensor], settings: AutoencoderSettings, step: int) -> Tensor:
    if len(pools) > 1 and step % LONG_EVERY == 0:
        return crops(pools[1], max(1, settings.batch // 2), settings.crop)
    return crops(pools[0], settings.batch, settings.crop)


def _restore(
    checkpoints: Checkpoints, vae: AutoencoderKLWan, average: TimedAverage, optimizers: Optimizers
) -> int:
    state = checkpoints.load("autoencoder")
    vae.load_state_dict(state["weights"])
    average.module.load_state_dict(state["average"])
    average.trained = state.get("trained", 0.0)
    if "optimizers" in state:
        optimizers.load(state["optimizers"])
    report(f"resumed the autoencoder at step {state['step']}")
    return state["step"]
