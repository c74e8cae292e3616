"""HiDream-I1."""

import diffusers
import torch
from diffusers.models.transformers.transformer_hidream_image import (
    HiDreamAttention,
    HiDreamAttnProcessor,
    apply_rope,
)
from torch import Tensor

from vdit_sparse.grid import Grid
from vdit_sparse.pipelines.attach import SparsePipelineMixin
from vdit_sparse.pipelines.families import Arguments, Family
from vdit_sparse.pipelines.images import refuses_images
from vdit_sparse.pipelines.processor import SDPASparseAttnProcessor
from vdit_sparse.pipelines.projections import Triple, joined


class HiDreamSparseAttnProcessor(SDPASparseAttnProcessor):
    """As `HiDreamAttnProcessor`: image, padding, then text; blocks of one stream give all as
    `hidden_states`.

    Images that are not square are padded to the model's largest. Stock multiplies the keys of the
    padding by zero but does not mask them: they are seen, here as text, by every query.
    """

    def __call__(
        self,
        attn: HiDreamAttention,
        hidden_states: Tensor,
        hidden_states_masks: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        query, key, value = _stream(attn, hidden_states, "")
        if hidden_states_masks is not None:
            key = key * hidden_states_masks[..., None, None]
        if not attn.single:
            text = _stream(attn, encoder_hidden_states, "_t")
            query, key, value = joined((query, key, value), text)
        query, key = _rotate(query, key, image_rotary_emb)
        out = self.attend(query, key, value).flatten(2, 3).to(query.dtype)
        if attn.single:
            return attn.to_out(out)
        image, text = out.split((hidden_states.shape[1], encoder_hidden_states.shape[1]), dim=1)
        return attn.to_out(image), attn.to_out_t(text)


def _stream(attn: HiDreamAttention, x: Tensor, suffix: str) -> Triple:
    """Queries, keys, both after their norm, and values `[B, S, H, D]` by the layers whose names end
    in suffix."""
    query, key, value = (getattr(attn, f"to_{name}{suffix}") for name in "qkv")
    norm_q, norm_k = (getattr(attn, f"{name}_rms_norm{suffix}") for name in "qk")
    parts = norm_q(query(x)).to(x.dtype), norm_k(key(x)).to(x.dtype), value(x)
    return tuple(part.unflatten(2, (attn.heads, -1)) for part in parts)


def _rotate(query: Tensor, key: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
    """RoPE on as much of D as rotary `[B, S, 1, D / 2, 2, 2]` covers: all of it, or the first
    half."""
    size = query.shape[-1]
    if rotary.shape[-3] * 2 == size:
        return apply_rope(query, key, rotary)
    rotated = apply_rope(query[..., : size // 2], key[..., : size // 2], rotary)
    pairs = zip(rotated, (query, key), strict=True)
    return tuple(torch.cat([first, x[..., size // 2 :]], dim=-1) for first, x in pairs)


def _grid(transformer: torch.nn.Module, arguments: Arguments) -> Grid:
    """Latent tokens of `hidden_states [B, C, H, W]`, then padding if the image is not square, then
    the prompt: T5's states, Llama's last and Llama's of the layer."""
    if arguments["hidden_states"].ndim != 4:
        raise ValueError(
            "Expected latents [B, C, H, W], got "
            f"{tuple(arguments['hidden_states'].shape)}; leave it to HiDream to patch them."
        )
    height, width = arguments["hidden_states"].shape[2:]
    patch = transformer.config.patch_size
    image = (height // patch) * (width // patch)
    padding = 0 if height == width else transformer.max_seq - image
    llama = arguments["encoder_hidden_states_llama3"][0].shape[1]
    text = arguments["encoder_hidden_states_t5"].shape[1] + 2 * llama
    return Grid(1, height // patch, width // patch, padding + text)


def _layers(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {
        f"{stack}.{i}.block.attn1": block.block.attn1
        for stack in ("double_stream_blocks", "single_stream_blocks")
        for i, block in enumerate(getattr(transformer, stack))
    }


def _timestep(arguments: Arguments) -> Tensor:
    return arguments["timesteps"]


FAMILY = Family(
    {HiDreamAttnProcessor: HiDreamSparseAttnProcessor},
    _layers,
    _grid,
    timestep=_timestep,
    refuses=refuses_images,
)


class HiDreamImagePipeline(SparsePipelineMixin, diffusers.HiDreamImagePipeline):
    """`diffusers.HiDreamImagePipeline` with `set_attn_processor`."""
