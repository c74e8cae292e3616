"""Allegro."""

import diffusers
import torch
from diffusers.models.attention_processor import AllegroAttnProcessor2_0, Attention
from diffusers.models.embeddings import apply_rotary_emb_allegro
from torch import Tensor

from vdit_sparse.grid import Grid
from vdit_sparse.pipelines.attach import SparsePipelineMixin
from vdit_sparse.pipelines.families import Arguments, Family
from vdit_sparse.pipelines.processor import SDPASparseAttnProcessor
from vdit_sparse.pipelines.projections import project, take_neither


class AllegroSparseAttnProcessor(SDPASparseAttnProcessor):
    """As `AllegroAttnProcessor2_0` in self-attention; text goes through cross-attention."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        image_rotary_emb: tuple | None = None,
    ) -> Tensor:
        take_neither(encoder_hidden_states, attention_mask)
        query, key, value = project(attn, hidden_states)
        if image_rotary_emb is not None:
            query, key = (_rotate(x, *image_rotary_emb) for x in (query, key))
        out = self.attend(query, key, value).flatten(2, 3)
        return attn.to_out[1](attn.to_out[0](out))


def _rotate(x: Tensor, tables: tuple, positions: tuple) -> Tensor:
    """RoPE on x `[B, S, H, D]`, a third of D for each axis."""
    return apply_rotary_emb_allegro(x.transpose(1, 2), tables, positions).transpose(1, 2)


def _grid(transformer: torch.nn.Module, arguments: Arguments) -> Grid:
    """Latent tokens of `hidden_states [B, C, F, H, W]`."""
    frames, height, width = arguments["hidden_states"].shape[2:]
    patch, patch_t = transformer.config.patch_size, transformer.config.patch_size_t
    return Grid(frames // patch_t, height // patch, width // patch)


def _layers(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    blocks = enumerate(transformer.transformer_blocks)
    return {f"transformer_blocks.{i}.attn1": block.attn1 for i, block in blocks}


FAMILY = Family({AllegroAttnProcessor2_0: AllegroSparseAttnProcessor}, _layers, _grid)


class AllegroPipeline(SparsePipelineMixin, diffusers.AllegroPipeline):
    """`diffusers.AllegroPipeline` with `set_attn_processor`."""

    generation = {"fps": 15}
