"""What FLUX and its kin share: text, then image, in blocks of two streams and of one."""

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, _get_qkv_projections
from torch import Tensor

from vdit_sparse.grid import Grid
from vdit_sparse.pipelines.families import Arguments
from vdit_sparse.pipelines.images import grid_of_ids
from vdit_sparse.pipelines.processor import SparseAttnProcessor
from vdit_sparse.pipelines.projections import Triple, joined


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
        parts = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        query, key, value = flux_joint(attn, parts)
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


def flux_joint(attn: torch.nn.Module, parts: tuple) -> Triple:
    """Queries, keys (after norm) and values of text and image, `[B, S, H, D]`, from the projections
    `parts` of the image, then of the text if the block has two streams."""
    # Tensor parallelism leaves fewer heads than attn.heads.
    query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in parts[:3])
    query, key = attn.norm_q(query), attn.norm_k(key)
    if attn.added_kv_proj_dim is None:
        return query, key, value
    text_query, text_key, text_value = (x.unflatten(-1, (-1, attn.head_dim)) for x in parts[3:])
    added = attn.norm_added_q(text_query), attn.norm_added_k(text_key), text_value
    return joined(added, (query, key, value))


def flux_grid(transformer: torch.nn.Module, arguments: Arguments) -> Grid:
    """The target's rows and columns; reference images after it count as text."""
    return grid_of_ids(arguments["img_ids"], flux_lead(transformer, arguments))


def flux_lead(transformer: torch.nn.Module, arguments: Arguments) -> int:
    """The prompt's tokens, which stand first."""
    return arguments["encoder_hidden_states"].shape[1]


def flux_layers(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The attention of blocks of two streams, then of one."""
    return {
        f"{stack}.{i}.attn": block.attn
        for stack in ("transformer_blocks", "single_transformer_blocks")
        for i, block in enumerate(getattr(transformer, stack))
    }
