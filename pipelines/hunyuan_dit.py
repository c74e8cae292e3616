"""HunyuanDiT."""

import diffusers
import torch
from diffusers.models.attention_processor import (
    Attention,
    FusedHunyuanAttnProcessor2_0,
    HunyuanAttnProcessor2_0,
)
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from vdit_sparse.grid import Grid
from vdit_sparse.pipelines.attach import SparsePipelineMixin
from vdit_sparse.pipelines.families import Arguments, Family
from vdit_sparse.pipelines.images import refuses_images
from vdit_sparse.pipelines.processor import SDPASparseAttnProcessor
from vdit_sparse.pipelines.projections import normalise, project, take_neither


class HunyuanDiTSparseAttnProcessor(SDPASparseAttnProcessor):
    """As `HunyuanAttnProcessor2_0` in self-attention; text goes through cross-attention."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        take_neither(encoder_hidden_states, attention_mask)
        query, key, value = project(attn, hidden_states)
        query, key = normalise(query, key, (attn.norm_q, attn.norm_k))
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        out = self.attend(query, key, value).flatten(2, 3).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](out))


def _grid(transformer: torch.nn.Module, arguments: Arguments) -> Grid:
    """Latent tokens of `hidden_states [B, C, H, W]`."""
    height, width = arguments["hidden_states"].shape[2:]
    patch = transformer.config.patch_size
    return Grid(1, height // patch, width // patch)


def _layers(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {f"blocks.{i}.attn1": block.attn1 for i, block in enumerate(transformer.blocks)}


FAMILY = Family(
    {
        HunyuanAttnProcessor2_0: HunyuanDiTSparseAttnProcessor,
        FusedHunyuanAttnProcessor2_0: HunyuanDiTSparseAttnProcessor,
    },
    _layers,
    _grid,
    refuses=refuses_images,
)


class HunyuanDiTPipeline(SparsePipelineMixin, diffusers.HunyuanDiTPipeline):
    """`diffusers.HunyuanDiTPipeline` with `set_attn_processor`."""


class HunyuanDiTControlNetPipeline(SparsePipelineMixin, diffusers.HunyuanDiTControlNetPipeline):
    """`diffusers.HunyuanDiTControlNetPipeline` with `set_attn_processor`; its controlnet stays
    dense."""
