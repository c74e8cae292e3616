"""Z-Image (with ControlNet)."""

from dataclasses import replace

import diffusers
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_z_image import (
    SEQ_MULTI_OF,
    ZSingleStreamAttnProcessor,
)
from torch import Tensor

from vdit_sparse.grid import Grid
from vdit_sparse.pipelines.attach import SparsePipelineMixin
from vdit_sparse.pipelines.families import Arguments, Family
from vdit_sparse.pipelines.images import FEW_STEPS, refuses_images
from vdit_sparse.pipelines.processor import SparseAttnProcessor
from vdit_sparse.pipelines.projections import normalise, project


class ZImageSparseAttnProcessor(SparseAttnProcessor):
    """As `ZSingleStreamAttnProcessor`: image, then text, in one stream."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        query, key, value = project(attn, hidden_states)
        query, key = normalise(query, key, (attn.norm_q, attn.norm_k))
        if freqs_cis is not None:
            query, key = _rotate(query, freqs_cis), _rotate(key, freqs_cis)
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = attention_mask[:, None, None, :]
        out = self.attend(query, key, value, attention_mask).flatten(2, 3).to(query.dtype)
        out = attn.to_out[0](out)
        return attn.to_out[1](out) if len(attn.to_out) > 1 else out


def _rotate(x: Tensor, freqs: Tensor) -> Tensor:
    """RoPE on interleaved pairs of x `[B, S, H, D]`, freqs complex `[B, S, D / 2]`."""
    with torch.amp.autocast("cuda", enabled=False):
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * freqs.unsqueeze(2)).flatten(3).type_as(x)


def _grid(transformer: torch.nn.Module, arguments: Arguments) -> Grid:
    """Latent tokens of the images, a list of `[C, F, H, W]`, then what fills them up to a multiple
    of 32, then the prompts, filled up likewise, and then to the longest of the batch."""
    images, prompts = arguments["x"], arguments["cap_feats"]
    if isinstance(images[0], list) or len({image.shape for image in images}) > 1:
        raise ValueError(
            "Sparse attention on Z-Image takes images of one size and no reference images (Omni): "
            "their target starts at another token in each row of the batch."
        )
    patch, patch_t = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
    frames, height, width = images[0].shape[1:]
    image = Grid(frames // patch_t, height // patch, width // patch)
    longest = max(_filled(len(prompt)) for prompt in prompts)
    return replace(image, text=_filled(image.video) - image.video + longest)


def _filled(tokens: int) -> int:
    return -(-tokens // SEQ_MULTI_OF) * SEQ_MULTI_OF


def _layers(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Without `noise_refiner`, two layers of the image alone: the ControlNet calls them too, where
    the run does not know the step."""
    return {f"layers.{i}.attention": block.attention for i, block in enumerate(transformer.layers)}


def _timestep(arguments: Arguments) -> Tensor:
    """Z-Image's timesteps rise from 0 to 1."""
    return -arguments["t"]


FAMILY = Family(
    {ZSingleStreamAttnProcessor: ZImageSparseAttnProcessor},
    _layers,
    _grid,
    timestep=_timestep,
    refuses=refuses_images,
    presets={"draft-z-image-few-steps": FEW_STEPS},
)


class ZImagePipeline(SparsePipelineMixin, diffusers.ZImagePipeline):
    """`diffusers.ZImagePipeline` with `set_attn_processor`."""


class ZImageImg2ImgPipeline(SparsePipelineMixin, diffusers.ZImageImg2ImgPipeline):
    """`diffusers.ZImageImg2ImgPipeline` with `set_attn_processor`."""


class ZImageInpaintPipeline(SparsePipelineMixin, diffusers.ZImageInpaintPipeline):
    """`diffusers.ZImageInpaintPipeline` with `set_attn_processor`."""


class ZImageControlNetPipeline(SparsePipelineMixin, diffusers.ZImageControlNetPipeline):
    """`diffusers.ZImageControlNetPipeline` with `set_attn_processor`; the ControlNet's own
    attention stays dense."""


class ZImageControlNetInpaintPipeline(
    SparsePipelineMixin, diffusers.ZImageControlNetInpaintPipeline
):
    """`diffusers.ZImageControlNetInpaintPipeline` with `set_attn_processor`; the ControlNet's own
    attention stays dense."""
