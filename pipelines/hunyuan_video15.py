"""HunyuanVideo 1.5 (text and image to video)."""

import diffusers
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0
from torch import Tensor

from vdit_sparse.grid import Grid
from vdit_sparse.pipelines.attach import SparsePipelineMixin
from vdit_sparse.pipelines.families import Arguments, Family
from vdit_sparse.pipelines.processor import SparseAttnProcessor
from vdit_sparse.pipelines.projections import TEXT, joined, normalise, project


class HunyuanVideo15SparseAttnProcessor(SparseAttnProcessor):
    """As `HunyuanVideo15AttnProcessor2_0`: video, then text, whose real tokens come first.

    Stock spreads the text's mask to `[B, 1, S, S]` (12 GB at 121 frames of 720p) so that padding
    neither is seen nor sees. Here padding is not seen, dense or sparse, and what it would see is
    never seen again: the video is the same.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        sizes = (hidden_states.shape[1], encoder_hidden_states.shape[1])
        query, key, value = project(attn, hidden_states)
        query, key = normalise(query, key, (attn.norm_q, attn.norm_k))
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        text_query, text_key, text_value = project(attn, encoder_hidden_states, TEXT)
        norms = (attn.norm_added_q, attn.norm_added_k)
        text_query, text_key = normalise(text_query, text_key, norms)
        parts = joined((query, key, value), (text_query, text_key, text_value))
        out = self.attend(*parts, attention_mask).flatten(2, 3).to(query.dtype)
        video, text = out.split(sizes, dim=1)
        return attn.to_out[1](attn.to_out[0](video)), attn.to_add_out(text)

    def dense(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """Through diffusers' dispatcher, with a mask of keys `[B, 1, 1, S]`."""
        return super().dense(query, key, value, self.keys(mask, query)[:, None, None])

    def keys(self, mask: Tensor, query: Tensor) -> Tensor:
        """mask is that of the text, `[B, T]`."""
        return F.pad(mask.bool(), (query.shape[1] - mask.shape[1], 0), value=True)


def _grid(transformer: torch.nn.Module, arguments: Arguments) -> Grid:
    """Latent tokens of `hidden_states [B, C, F, H, W]`, then those of the image, of the glyphs and
    of the prompt."""
    frames, height, width = arguments["hidden_states"].shape[2:]
    patch, patch_t = transformer.config.patch_size, transformer.config.patch_size_t
    names = ("image_embeds", "encoder_hidden_states_2", "encoder_hidden_states")
    text = sum(arguments[name].shape[1] for name in names)
    return Grid(frames // patch_t, height // patch, width // patch, text)


def _layers(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    blocks = enumerate(transformer.transformer_blocks)
    return {f"transformer_blocks.{i}.attn": block.attn for i, block in blocks}


FAMILY = Family({HunyuanVideo15AttnProcessor2_0: HunyuanVideo15SparseAttnProcessor}, _layers, _grid)


class HunyuanVideo15Pipeline(SparsePipelineMixin, diffusers.HunyuanVideo15Pipeline):
    """`diffusers.HunyuanVideo15Pipeline` with `set_attn_processor`."""

    generation = {"fps": 24}


class HunyuanVideo15ImageToVideoPipeline(
    SparsePipelineMixin, diffusers.HunyuanVideo15ImageToVideoPipeline
):
    """`diffusers.HunyuanVideo15ImageToVideoPipeline` with `set_attn_processor`."""

    generation = {"fps": 24}
