"""Cosmos 1, Predict 2 and 2.5, Transfer 2.5 (text, image and video to video; text to image)."""

import diffusers
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_cosmos import CosmosAttnProcessor2_0
from torch import Tensor

from vdit_sparse.grid import Grid
from vdit_sparse.method import SparseAttention
from vdit_sparse.pipelines.attach import SparsePipelineMixin
from vdit_sparse.pipelines.families import Arguments, Family
from vdit_sparse.pipelines.images import refuses_images
from vdit_sparse.pipelines.processor import SparseAttnProcessor
from vdit_sparse.pipelines.projections import normalise, project, take_neither


class CosmosSparseAttnProcessor(SparseAttnProcessor):
    """As `CosmosAttnProcessor2_0` in self-attention; text goes through cross-attention.

    Unlike stock it follows a backend that is set on the model.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        take_neither(encoder_hidden_states, attention_mask)
        query, key, value = project(attn, hidden_states)
        query, key = normalise(query, key, (attn.norm_q, attn.norm_k))
        if image_rotary_emb is not None:
            query, key = (_rotate(x, image_rotary_emb) for x in (query, key))
        out = self.attend(query, key, value).flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](out))


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE on halves of D, x `[B, S, H, D]`."""
    return apply_rotary_emb(x, rotary, use_real_unbind_dim=-2, sequence_dim=1)


def _grid(transformer: torch.nn.Module, arguments: Arguments) -> Grid:
    """Latent tokens of `hidden_states [B, C, F, H, W]`."""
    shape = arguments["hidden_states"].shape[2:]
    sizes = zip(shape, transformer.config.patch_size, strict=True)
    return Grid(*(size // patch for size, patch in sizes))


def _layers(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    blocks = enumerate(transformer.transformer_blocks)
    return {f"transformer_blocks.{i}.attn1": block.attn1 for i, block in blocks}


def _refuses(transformer: torch.nn.Module, method: SparseAttention) -> str | None:
    """The models of images have no channel for a mask of given frames, as Predict's for video do,
    and no learned positions, as Cosmos 1."""
    config = transformer.config
    if config.in_channels == config.out_channels and config.extra_pos_embed_type is None:
        return refuses_images(transformer, method)
    return None


FAMILY = Family(
    {CosmosAttnProcessor2_0: CosmosSparseAttnProcessor}, _layers, _grid, refuses=_refuses
)


class CosmosTextToWorldPipeline(SparsePipelineMixin, diffusers.CosmosTextToWorldPipeline):
    """`diffusers.CosmosTextToWorldPipeline` with `set_attn_processor`."""

    generation = {"fps": 30}


class CosmosVideoToWorldPipeline(SparsePipelineMixin, diffusers.CosmosVideoToWorldPipeline):
    """`diffusers.CosmosVideoToWorldPipeline` with `set_attn_processor`."""

    generation = {"fps": 30}


class Cosmos2TextToImagePipeline(SparsePipelineMixin, diffusers.Cosmos2TextToImagePipeline):
    """`diffusers.Cosmos2TextToImagePipeline` with `set_attn_processor`."""


class Cosmos2VideoToWorldPipeline(SparsePipelineMixin, diffusers.Cosmos2VideoToWorldPipeline):
    """`diffusers.Cosmos2VideoToWorldPipeline` with `set_attn_processor`."""


class Cosmos2_5_PredictBasePipeline(SparsePipelineMixin, diffusers.Cosmos2_5_PredictBasePipeline):
    """`diffusers.Cosmos2_5_PredictBasePipeline` with `set_attn_processor`."""


class Cosmos2_5_TransferPipeline(SparsePipelineMixin, diffusers.Cosmos2_5_TransferPipeline):
    """`diffusers.Cosmos2_5_TransferPipeline` with `set_attn_processor`; its controlnet stays
    dense."""
