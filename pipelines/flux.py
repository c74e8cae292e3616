"""FLUX.1 (dev, schnell, Kontext, Fill)."""

import diffusers
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    _get_qkv_projections,
)
from torch import Tensor

from vdit_sparse.grid import Grid
from vdit_sparse.methods import PAROAttention
from vdit_sparse.pipelines.attach import SparsePipelineMixin
from vdit_sparse.pipelines.families import Arguments, Family
from vdit_sparse.pipelines.images import grid_of_ids, refuses_images
from vdit_sparse.pipelines.processor import SparseAttnProcessor
from vdit_sparse.pipelines.projections import joined


class FluxSparseAttnProcessor(SparseAttnProcessor):
    """As `FluxAttnProcessor`: text, then image, in blocks of two streams; blocks of one stream give
    both as `hidden_states`."""

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        query, key, value = _joint(attn, hidden_states, encoder_hidden_states)
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        out = self.attend(query, key, value, attention_mask).flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return out
        text = encoder_hidden_states.shape[1]
        text, image = out.split((text, out.shape[1] - text), dim=1)
        return attn.to_out[1](attn.to_out[0](image.contiguous())), attn.to_add_out(
            text.contiguous()
        )


def _joint(
    attn: FluxAttention, image: Tensor, text: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys (after norm) and values of text and image, `[B, S, H, D]`."""
    parts = _get_qkv_projections(attn, image, text)
    # Tensor parallelism leaves fewer heads than attn.heads.
    query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in parts[:3])
    query, key = attn.norm_q(query), attn.norm_k(key)
    if attn.added_kv_proj_dim is None:
        return query, key, value
    text_query, text_key, text_value = (x.unflatten(-1, (-1, attn.head_dim)) for x in parts[3:])
    added = attn.norm_added_q(text_query), attn.norm_added_k(text_key), text_value
    return joined(added, (query, key, value))


def _grid(transformer: torch.nn.Module, arguments: Arguments) -> Grid:
    """The target's rows and columns; reference images (Kontext) count as text."""
    return grid_of_ids(arguments["img_ids"], _lead(transformer, arguments))


def _lead(transformer: torch.nn.Module, arguments: Arguments) -> int:
    return arguments["encoder_hidden_states"].shape[1]


def _layers(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {
        f"{stack}.{i}.attn": block.attn
        for stack in ("transformer_blocks", "single_transformer_blocks")
        for i, block in enumerate(getattr(transformer, stack))
    }


PRESETS = {
    # The paper, FLUX.1-dev, 1024x1024, 30 steps. Needs a calibration.
    "paro-flux": PAROAttention(dense_steps=0),
}

FAMILY = Family(
    {FluxAttnProcessor: FluxSparseAttnProcessor},
    _layers,
    _grid,
    lead=_lead,
    refuses=refuses_images,
    presets=PRESETS,
)


class FluxPipeline(SparsePipelineMixin, diffusers.FluxPipeline):
    """`diffusers.FluxPipeline` with `set_attn_processor`."""


class FluxFillPipeline(SparsePipelineMixin, diffusers.FluxFillPipeline):
    """`diffusers.FluxFillPipeline` with `set_attn_processor`."""


class FluxKontextPipeline(SparsePipelineMixin, diffusers.FluxKontextPipeline):
    """`diffusers.FluxKontextPipeline` with `set_attn_processor`."""
