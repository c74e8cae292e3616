"""Attention of the Wan transformer with its input projections as one matrix product.

A quarter of a block's linear work is three small projections of the same tokens. One product
reads the tokens once instead of three times, forward and backward, and their gradient needs no
sums. The weights stay three parameters: checkpoints, and Muon's matrices, are those of the stock
model.
"""

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor, nn


class FusedAttnProcessor:
    """What `WanAttnProcessor` computes for text-to-video, with fewer and larger products.

    `set_attention_backend` chooses the kernel, as for the stock processor.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Returns attention's output `[batch, tokens, width]`.

        Args:
            attn: the layer, without image projections.
            hidden_states: `[batch, tokens, width]`.
            encoder_hidden_states: text `[batch, length, width]`; None for self-attention.
            attention_mask: handed on.
            rotary_emb: cosines and sines `[1, tokens, 1, head_dim]`, each value twice.
        """
        if encoder_hidden_states is None:
            query, key, value = _project(hidden_states, attn.to_q, attn.to_k, attn.to_v)
        else:
            query = attn.to_q(hidden_states)
            key, value = _project(encoder_hidden_states, attn.to_k, attn.to_v)
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        if rotary_emb is not None:
            query, key = _rotate(query, *rotary_emb), _rotate(key, *rotary_emb)
        output = dispatch_attention_fn(
            query, key, value, attn_mask=attention_mask, backend=self._attention_backend
        )
        output = output.flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](output))


def fuse_attention(transformer: WanTransformer3DModel) -> None:
    """Gives every attention layer of the transformer a `FusedAttnProcessor`."""
    for block in transformer.blocks:
        block.attn1.set_processor(FusedAttnProcessor())
        block.attn2.set_processor(FusedAttnProcessor())


def _project(hidden: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    weight = torch.cat([layer.weight for layer in layers])
    bias = torch.cat([layer.bias for layer in layers])
    return F.linear(hidden, weight, bias).chunk(len(layers), dim=-1)


def _rotate(hidden: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    # Stacked, not written into an empty tensor by halves as in diffusers: those writes become
    # copies in the backward pass.
    even, odd = hidden.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = cosine[..., 0::2], sine[..., 1::2]
    pairs = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1)
    return pairs.flatten(-2).type_as(hidden)
