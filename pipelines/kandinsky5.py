"""Kandinsky 5 (text and image to video, text and image to image)."""

import diffusers
import torch
from diffusers.models.transformers.transformer_kandinsky import (
    Kandinsky5Attention,
    Kandinsky5AttnProcessor,
)
from torch import Tensor

from vdit_sparse.grid import Grid
from vdit_sparse.method import SparseAttention
from vdit_sparse.pipelines.attach import SparsePipelineMixin
from vdit_sparse.pipelines.families import Arguments, Family
from vdit_sparse.pipelines.processor import SparseAttnProcessor


class Kandinsky5SparseAttnProcessor(SparseAttnProcessor):
    """As `Kandinsky5AttnProcessor` in self-attention without NABLA, its own sparse attention."""

    def __call__(
        self,
        attn: Kandinsky5Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        sparse_params: dict | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None or sparse_params is not None:
            raise ValueError("A sparse processor is for self-attention without sparse_params.")
        layers = (attn.to_query, attn.to_key, attn.to_value)
        query, key, value = (
            layer(hidden_states).unflatten(2, (attn.num_heads, -1)) for layer in layers
        )
        query = attn.query_norm(query.float()).type_as(query)
        key = attn.key_norm(key.float()).type_as(key)
        if rotary_emb is not None:
            query, key = (_rotate(x, rotary_emb) for x in (query, key))
        return attn.out_layer(self.attend(query, key, value).flatten(2, 3))


def _rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """RoPE by 2 x 2 matrices `[S, 1, D / 2, 2, 2]`, rounded to bf16 as stock does in any dtype."""
    pairs = x.unflatten(-1, (-1, 1, 2)).float()
    return (rotary * pairs).sum(dim=-1).flatten(-2).to(torch.bfloat16).type_as(x)


def _grid(transformer: torch.nn.Module, arguments: Arguments) -> Grid:
    """Latent tokens of `hidden_states [B, F, H, W, C]`."""
    shape = arguments["hidden_states"].shape[1:4]
    sizes = zip(shape, transformer.config.patch_size, strict=True)
    return Grid(*(size // patch for size, patch in sizes))


def _layers(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    blocks = enumerate(transformer.visual_transformer_blocks)
    return {f"visual_transformer_blocks.{i}.self_attention": b.self_attention for i, b in blocks}


def _refuses(transformer: torch.nn.Module, method: SparseAttention) -> str | None:
    """NABLA's checkpoints put tokens into the order of their tiles."""
    if transformer.config.attention_type != "nabla":
        return None
    return (
        "this checkpoint has sparse attention of its own, NABLA; to use another instead, turn it "
        'off with pipe.transformer.register_to_config(attention_type="regular")'
    )


FAMILY = Family(
    {Kandinsky5AttnProcessor: Kandinsky5SparseAttnProcessor}, _layers, _grid, refuses=_refuses
)


class Kandinsky5T2VPipeline(SparsePipelineMixin, diffusers.Kandinsky5T2VPipeline):
    """`diffusers.Kandinsky5T2VPipeline` with `set_attn_processor`."""

    generation = {"fps": 24}


class Kandinsky5I2VPipeline(SparsePipelineMixin, diffusers.Kandinsky5I2VPipeline):
    """`diffusers.Kandinsky5I2VPipeline` with `set_attn_processor`."""

    generation = {"fps": 24}


class Kandinsky5T2IPipeline(SparsePipelineMixin, diffusers.Kandinsky5T2IPipeline):
    """`diffusers.Kandinsky5T2IPipeline` with `set_attn_processor`."""


class Kandinsky5I2IPipeline(SparsePipelineMixin, diffusers.Kandinsky5I2IPipeline):
    """`diffusers.Kandinsky5I2IPipeline` with `set_attn_processor`."""
