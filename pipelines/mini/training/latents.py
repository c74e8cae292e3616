"""The denoiser's training data: normalised latents of rendered clips with their captions."""

import time
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from vdit_sparse.pipelines.mini.training.autoencoder import mixed_precision
from vdit_sparse.pipelines.mini.training.clips import ClipShape, Limit, render
from vdit_sparse.pipelines.mini.training.pacing import report
from vdit_sparse.pipelines.mini.training.whole_clip import WholeClip

CAPTION_TOKENS = 64
# 32 clips of 25 frames at 256 x 448: about 30 GiB of activations.
_PIXELS_AT_ONCE = 32 * 25 * 256 * 448


@dataclass(frozen=True)
class LatentSet:
    """Latents with captions, all on the training device.

    Attributes:
        latents: `[clips, channels, frames, height, width]` fp16, normalised per channel.
        tokens: `[clips, 64]` int64 caption tokens, padded with 0.
        empty: `[64]` int64, the tokens of the empty caption.
    """

    latents: Tensor
    tokens: Tensor
    empty: Tensor

    def draw(self, count: int, drop_caption: float) -> tuple[Tensor, Tensor]:
        """Returns random float32 latents and their tokens, some captions emptied, without a sync.

        Args:
            count: clips, drawn with replacement.
            drop_caption: probability of the empty caption.
        """
        device = self.latents.device
        chosen = torch.randint(len(self.latents), (count,), device=device)
        dropped = torch.rand(count, 1, device=device) < drop_caption
        tokens = torch.where(dropped, self.empty, self.tokens[chosen])
        return self.latents[chosen].float(), tokens


@torch.no_grad()
def cache_latents(
    vae: AutoencoderKLWan,
    tokenizer: PreTrainedTokenizerFast,
    shape: ClipShape,
    limit: Limit,
    seed: int,
) -> LatentSet:
    """Renders and encodes clips until the limit.

    Args:
        vae: frozen, on `shape.device`, with the latents' mean and deviation in its config.
        tokenizer: pads to 64 tokens.
        shape: of the clips.
        limit: clips and seconds.
        seed: of the first batch.
    """
    start = time.perf_counter()
    mean, std = (
        torch.tensor(values, device=shape.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    clip, latents, captions = WholeClip(vae), [], []
    batch = max(1, min(64, _PIXELS_AT_ONCE // (shape.height * shape.width * shape.frames)))
    for video, texts in render(shape, limit, seed):
        for part in video.split(batch):
            with mixed_precision(shape.device):
                posterior_mean = clip.encode(part).float().chunk(2, dim=1)[0]
            latents.append(((posterior_mean - mean) / std).half())
        captions += texts
    seconds = time.perf_counter() - start
    latents = torch.cat(latents)
    report(
        f"latents {tuple(latents.shape)} in {seconds:.1f} s, {len(captions) / seconds:.0f} clips/s"
    )
    tokens = tokenise(tokenizer, [*captions, ""]).to(shape.device)
    return LatentSet(latents, tokens[:-1], tokens[-1])


def tokenise(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> Tensor:
    """Returns tokens `[captions, 64]` int64, cut or padded with 0."""
    return tokenizer(
        captions,
        padding="max_length",
        max_length=CAPTION_TOKENS,
        truncation=True,
        return_tensors="pt",
    ).input_ids
