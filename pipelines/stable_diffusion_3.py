"""Stable Diffusion 3 and 3.5 (medium, large, turbo)."""

import diffusers
import torch
from diffusers.models.attention_processor import (
    Attention,
    FusedJointAttnProcessor2_0,
    JointAttnProcessor2_0,
)
from torch import Tensor

from vdit_sparse.grid import Grid
from vdit_sparse.pipelines.attach import SparsePipelineMixin
from vdit_sparse.pipelines.families import Arguments, Family
from vdit_sparse.pipelines.images import refuses_images
from vdit_sparse.pipelines.processor import SDPASparseAttnProcessor
from vdit_sparse.pipelines.projections import TEXT, joined, normalise, project


class StableDiffusion3SparseAttnProcessor(SDPASparseAttnProcessor):
    """As `JointAttnProcessor2_0`: image, then text, which has no mask; the second attention of 3.5
    medium gives the image alone."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        query, key, value = project(attn, hidden_states)
        query, key = normalise(query, key, (attn.norm_q, attn.norm_k))
        if encoder_hidden_states is None:
            out = self.attend(query, key, value).flatten(2, 3)
            return attn.to_out[1](attn.to_out[0](out))
        text_query, text_key, text_value = project(attn, encoder_hidden_states, TEXT)
        norms = (attn.norm_added_q, attn.norm_added_k)
        text_query, text_key = normalise(text_query, text_key, norms)
        parts = joined((query, key, value), (text_query, text_key, text_value))
        out = self.attend(*parts).flatten(2, 3)
        tokens = hidden_states.shape[1]
        image, text = out[:, :tokens], out[:, tokens:]
        if not attn.context_pre_only:  # the last layer has no use for its text
            text = attn.to_add_out(text)
        return attn.to_out[1](attn.to_out[0](image)), text


def _grid(transformer: torch.nn.Module, arguments: Arguments) -> Grid:
    """Latent tokens of `hidden_states [B, C, H, W]`, then those of CLIP's and T5's prompts."""
    height, width = arguments["hidden_states"].shape[2:]
    patch, text = transformer.config.patch_size, arguments["encoder_hidden_states"].shape[1]
    return Grid(1, height // patch, width // patch, text)


def _layers(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    layers = {}
    for i, block in enumerate(transformer.transformer_blocks):
        layers[f"transformer_blocks.{i}.attn"] = block.attn
        if block.attn2 is not None:
            layers[f"transformer_blocks.{i}.attn2"] = block.attn2
    return layers


FAMILY = Family(
    {
        JointAttnProcessor2_0: StableDiffusion3SparseAttnProcessor,
        FusedJointAttnProcessor2_0: StableDiffusion3SparseAttnProcessor,
    },
    _layers,
    _grid,
    refuses=refuses_images,
)


class StableDiffusion3Pipeline(SparsePipelineMixin, diffusers.StableDiffusion3Pipeline):
    """`diffusers.StableDiffusion3Pipeline` with `set_attn_processor`."""


class StableDiffusion3Img2ImgPipeline(
    SparsePipelineMixin, diffusers.StableDiffusion3Img2ImgPipeline
):
    """`diffusers.StableDiffusion3Img2ImgPipeline` with `set_attn_processor`."""


class StableDiffusion3InpaintPipeline(
    SparsePipelineMixin, diffusers.StableDiffusion3InpaintPipeline
):
    """`diffusers.StableDiffusion3InpaintPipeline` with `set_attn_processor`."""


class StableDiffusion3ControlNetPipeline(
    SparsePipelineMixin, diffusers.StableDiffusion3ControlNetPipeline
):
    """`diffusers.StableDiffusion3ControlNetPipeline` with `set_attn_processor`; the ControlNet's
    own attention stays dense."""


class StableDiffusion3ControlNetInpaintingPipeline(
    SparsePipelineMixin, diffusers.StableDiffusion3ControlNetInpaintingPipeline
):
    """`diffusers.StableDiffusion3ControlNetInpaintingPipeline` with `set_attn_processor`; the
    ControlNet's own attention stays dense."""
