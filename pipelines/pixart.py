"""PixArt alpha and Sigma."""

import diffusers
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
)
from torch import Tensor

from vdit_sparse.grid import Grid
from vdit_sparse.pipelines.attach import SparsePipelineMixin
from vdit_sparse.pipelines.families import Arguments, Family
from vdit_sparse.pipelines.images import refuses_images
from vdit_sparse.pipelines.processor import SDPASparseAttnProcessor
from vdit_sparse.pipelines.projections import project, take_neither


class PixArtSparseAttnProcessor(SDPASparseAttnProcessor):
    """As `AttnProcessor2_0` in PixArt's self-attention, which has neither norms nor RoPE; text goes
    through cross-attention."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        take_neither(encoder_hidden_states, attention_mask)
        out = self.attend(*project(attn, hidden_states)).flatten(2, 3)
        return attn.to_out[1](attn.to_out[0](out))


def _grid(transformer: torch.nn.Module, arguments: Arguments) -> Grid:
    """Latent tokens of `hidden_states [B, C, H, W]`."""
    height, width = arguments["hidden_states"].shape[2:]
    patch = transformer.config.patch_size
    return Grid(1, height // patch, width // patch)


def _layers(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    blocks = enumerate(transformer.transformer_blocks)
    return {f"transformer_blocks.{i}.attn1": block.attn1 for i, block in blocks}


FAMILY = Family(
    {
        AttnProcessor2_0: PixArtSparseAttnProcessor,
        FusedAttnProcessor2_0: PixArtSparseAttnProcessor,
    },
    _layers,
    _grid,
    refuses=refuses_images,
)


class PixArtAlphaPipeline(SparsePipelineMixin, diffusers.PixArtAlphaPipeline):
    """`diffusers.PixArtAlphaPipeline` with `set_attn_processor`."""


class PixArtSigmaPipeline(SparsePipelineMixin, diffusers.PixArtSigmaPipeline):
    """`diffusers.PixArtSigmaPipeline` with `set_attn_processor`."""
