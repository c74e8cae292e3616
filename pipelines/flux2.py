"""FLUX.2 (dev and klein, with reference images)."""

import diffusers
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux2 import (
    Flux2Attention,
    Flux2AttnProcessor,
    Flux2ParallelSelfAttention,
    Flux2ParallelSelfAttnProcessor,
    _get_qkv_projections,
)
from torch import Tensor

from vdit_sparse.pipelines.attach import SparsePipelineMixin
from vdit_sparse.pipelines.families import Family, Parallel
from vdit_sparse.pipelines.flux_attention import flux_grid, flux_joint, flux_layers, flux_lead
from vdit_sparse.pipelines.images import FEW_STEPS, refuses_images
from vdit_sparse.pipelines.processor import SparseAttnProcessor

Rotary = tuple[Tensor, Tensor] | None


class Flux2SparseAttnProcessor(SparseAttnProcessor):
    """As `Flux2AttnProcessor`, of blocks of two streams: text, then image."""

    def __call__(
        self,
        attn: Flux2Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        parts = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        query, key, value = flux_joint(attn, parts)
        query, key = _rotate(query, key, image_rotary_emb)
        out = self.attend(query, key, value, attention_mask).flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return attn.to_out[1](attn.to_out[0](out))
        tokens = encoder_hidden_states.shape[1]
        text, image = out.split((tokens, out.shape[1] - tokens), dim=1)
        text = attn.to_add_out(text)
        return attn.to_out[1](attn.to_out[0](image)), text


class Flux2ParallelSparseAttnProcessor(SparseAttnProcessor):
    """As `Flux2ParallelSelfAttnProcessor`, of blocks of one stream, which runs the MLP too."""

    def __call__(
        self,
        attn: Flux2ParallelSelfAttention,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary = None,
    ) -> Tensor:
        both = attn.to_qkv_mlp_proj(hidden_states)
        # Tensor parallelism leaves a share of each.
        qkv, mlp = 3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor
        qkv = both.shape[-1] * qkv // (qkv + mlp)
        qkv, mlp = both.split((qkv, both.shape[-1] - qkv), dim=-1)
        query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in qkv.chunk(3, dim=-1))
        query, key = _rotate(attn.norm_q(query), attn.norm_k(key), image_rotary_emb)
        out = self.attend(query, key, value, attention_mask).flatten(2, 3).to(query.dtype)
        return attn.to_out(torch.cat([out, attn.mlp_act_fn(mlp)], dim=-1))


def _rotate(query: Tensor, key: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    if rotary is None:
        return query, key
    return tuple(apply_rotary_emb(x, rotary, sequence_dim=1) for x in (query, key))


FAMILY = Family(
    {
        Flux2AttnProcessor: Flux2SparseAttnProcessor,
        Flux2ParallelSelfAttnProcessor: Flux2ParallelSparseAttnProcessor,
    },
    flux_layers,
    flux_grid,
    lead=flux_lead,
    refuses=refuses_images,
    presets={"draft-flux2-few-steps": FEW_STEPS},
    parallel=Parallel(joint=True),
)


class Flux2Pipeline(SparsePipelineMixin, diffusers.Flux2Pipeline):
    """`diffusers.Flux2Pipeline` with `set_attn_processor`."""


class Flux2KleinPipeline(SparsePipelineMixin, diffusers.Flux2KleinPipeline):
    """`diffusers.Flux2KleinPipeline` with `set_attn_processor`."""


class Flux2KleinInpaintPipeline(SparsePipelineMixin, diffusers.Flux2KleinInpaintPipeline):
    """`diffusers.Flux2KleinInpaintPipeline` with `set_attn_processor`."""
