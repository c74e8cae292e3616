"""Self-attention of Wan's blocks, which Wan, VACE and SkyReels-V2 have in common."""

import torch
from diffusers.models.transformers.transformer_wan import WanAttention, _get_qkv_projections
from torch import Tensor

from vdit_sparse.grid import Grid
from vdit_sparse.kernels.qk_prepare import prepare_wan
from vdit_sparse.pipelines.families import Arguments
from vdit_sparse.pipelines.one_pass import is_one_pass
from vdit_sparse.pipelines.processor import SparseAttnProcessor


class WanSparseAttnProcessor(SparseAttnProcessor):
    """Self-attention of a Wan block: as `WanAttnProcessor`, but for the attention itself."""

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("Wan's self-attention takes neither encoder states nor a mask.")
        query, key, value = query_key_value(attn, hidden_states, rotary_emb, self)
        hidden_states = self.attend(query, key, value).flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](hidden_states))


def query_key_value(
    attn: torch.nn.Module,
    hidden_states: Tensor,
    rotary_emb: tuple[Tensor, Tensor] | None,
    processor: SparseAttnProcessor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys (after norm and RoPE) and values of a self-attention layer, `[B, S, H, D]`;
    in one pass on a GPU where the processor's call is sparse or compiled (`is_one_pass`)."""
    query, key, value = _get_qkv_projections(attn, hidden_states, None)
    norms = attn.norm_q, attn.norm_k
    if processor and is_one_pass(processor, query, norms, torch.nn.RMSNorm, rotary_emb):
        weights, eps = [norm.weight for norm in norms], attn.norm_q.eps
        query, key = prepare_wan(query, key, *weights, eps, rotary_emb, heads=attn.heads)
        return query, key, value.unflatten(2, (attn.heads, -1))
    query, key = attn.norm_q(query), attn.norm_k(key)
    query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
    if rotary_emb is not None:
        query, key = _rotate(query, *rotary_emb), _rotate(key, *rotary_emb)
    return query, key, value


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on interleaved pairs: x `[B, S, H, D]`; cos, sin `[1, S, 1, D]`, each value twice."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out


def latent_grid(transformer: torch.nn.Module, arguments: Arguments) -> Grid:
    """Latent tokens of `hidden_states [B, C, F, H, W]` after patching."""
    sizes = arguments["hidden_states"].shape[2:]
    patches = transformer.config.patch_size
    return Grid(*(size // patch for size, patch in zip(sizes, patches, strict=True)))
