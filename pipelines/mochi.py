"""Mochi 1."""

import diffusers
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import MochiAttention, MochiAttnProcessor2_0
from torch import Tensor

from vdit_sparse.grid import Grid
from vdit_sparse.pipelines.attach import SparsePipelineMixin
from vdit_sparse.pipelines.families import Arguments, Family
from vdit_sparse.pipelines.processor import SparseAttnProcessor
from vdit_sparse.pipelines.projections import TEXT, joined, normalise, project


class MochiSparseAttnProcessor(SparseAttnProcessor):
    """As `MochiAttnProcessor2_0`: video, then text, whose padding is left out row by row."""

    def __call__(
        self,
        attn: MochiAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        sizes = (hidden_states.shape[1], encoder_hidden_states.shape[1])
        query, key, value = project(attn, hidden_states)
        query, key = normalise(query, key, (attn.norm_q, attn.norm_k))
        text_query, text_key, text_value = project(attn, encoder_hidden_states, TEXT)
        norms = (attn.norm_added_q, attn.norm_added_k)
        text_query, text_key = normalise(text_query, text_key, norms)
        if image_rotary_emb is not None:
            query, key = _rotate(query, *image_rotary_emb), _rotate(key, *image_rotary_emb)
        parts = joined((query, key, value), (text_query, text_key, text_value))
        video, text = self.attend(*parts, attention_mask).flatten(2, 3).split(sizes, dim=1)
        video = attn.to_out[1](attn.to_out[0](video))
        # The last layer has no use for its text.
        return video, attn.to_add_out(text) if hasattr(attn, "to_add_out") else text

    def dense(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """As stock: each batch row alone, over the video and the text tokens of mask `[B, T]`."""
        video = query.shape[1] - mask.shape[1]
        out = torch.zeros_like(query)
        for row, real in enumerate(mask):
            kept = F.pad(real.bool(), (video, 0), value=True).nonzero().flatten()
            q, k, v = (x[row : row + 1, kept].transpose(1, 2) for x in (query, key, value))
            one = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            out[row : row + 1, : len(kept)] = one
        return out

    def keys(self, mask: Tensor, query: Tensor) -> Tensor:
        """mask is that of the text, `[B, T]`."""
        return F.pad(mask.bool(), (query.shape[1] - mask.shape[1], 0), value=True)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on interleaved pairs: x `[B, S, H, D]`; cos, sin `[S, H, D / 2]`, each head its own."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    pairs = (even * cos - odd * sin).to(x.dtype), (even * sin + odd * cos).to(x.dtype)
    return torch.stack(pairs, dim=-1).flatten(-2)


def _grid(transformer: torch.nn.Module, arguments: Arguments) -> Grid:
    """Latent tokens of `hidden_states [B, C, F, H, W]`, then those of the prompt, padded."""
    frames, height, width = arguments["hidden_states"].shape[2:]
    patch, text = transformer.config.patch_size, arguments["encoder_hidden_states"].shape[1]
    return Grid(frames, height // patch, width // patch, text)


def _layers(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    blocks = enumerate(transformer.transformer_blocks)
    return {f"transformer_blocks.{i}.attn1": block.attn1 for i, block in blocks}


def _timestep(arguments: Arguments) -> Tensor:
    """Mochi's timesteps rise from 0 to 1000."""
    return -arguments["timestep"]


FAMILY = Family(
    {MochiAttnProcessor2_0: MochiSparseAttnProcessor}, _layers, _grid, timestep=_timestep
)


class MochiPipeline(SparsePipelineMixin, diffusers.MochiPipeline):
    """`diffusers.MochiPipeline` with `set_attn_processor`."""

    generation = {"fps": 30}
