"""Qwen-Image (with Edit, Edit Plus, Layered and ControlNet)."""

import diffusers
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    apply_rotary_emb_qwen,
)
from torch import Tensor

from vdit_sparse.grid import Grid
from vdit_sparse.method import SparseAttention
from vdit_sparse.methods import RadialAttention
from vdit_sparse.pipelines.attach import SparsePipelineMixin
from vdit_sparse.pipelines.families import Arguments, Family, Parallel
from vdit_sparse.pipelines.images import refuses_images
from vdit_sparse.pipelines.processor import SparseAttnProcessor
from vdit_sparse.pipelines.projections import TEXT, VIDEO, Triple, joined, normalise


class QwenImageSparseAttnProcessor(SparseAttnProcessor):
    """As `QwenDoubleStreamAttnProcessor2_0`: text, then image; padded text is masked as keys."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if encoder_hidden_states is None or attention_mask is not None:
            raise ValueError("Qwen-Image's attention takes text, and a mask of the text only.")
        image_freqs, text_freqs = image_rotary_emb or (None, None)
        norms = (attn.norm_q, attn.norm_k), (attn.norm_added_q, attn.norm_added_k)
        image = _stream(attn, hidden_states, VIDEO, norms[0], image_freqs)
        text = _stream(attn, encoder_hidden_states, TEXT, norms[1], text_freqs)
        query, key, value = joined(text, image)
        mask = _keys(encoder_hidden_states_mask, hidden_states)
        out = self.attend(query, key, value, mask).flatten(2, 3).to(query.dtype)
        tokens = encoder_hidden_states.shape[1]
        text, image = out[:, :tokens].contiguous(), out[:, tokens:].contiguous()
        image = attn.to_out[0](image)
        if len(attn.to_out) > 1:
            image = attn.to_out[1](image)
        return image, attn.to_add_out(text)


def _stream(
    attn: Attention, x: Tensor, names: tuple[str, str, str], norms: tuple, freqs: Tensor | None
) -> Triple:
    """Queries, keys (after norm and RoPE) and values `[B, S, H, D]` of one stream."""
    # Tensor parallelism leaves fewer heads than attn.heads.
    size = attn.inner_dim // attn.heads
    query, key, value = (getattr(attn, name)(x).unflatten(-1, (-1, size)) for name in names)
    query, key = normalise(query, key, norms)
    if freqs is not None:
        query = apply_rotary_emb_qwen(query, freqs, use_real=False)
        key = apply_rotary_emb_qwen(key, freqs, use_real=False)
    return query, key, value


def _keys(mask: Tensor | None, image: Tensor) -> Tensor | None:
    """The text's mask `[B, T]` as one of all keys, `[B, 1, 1, T + S]`."""
    if mask is None:
        return None
    tokens = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
    return torch.cat([mask, tokens], dim=1)[:, None, None, :]


def _grid(transformer: torch.nn.Module, arguments: Arguments) -> Grid:
    """The target's rows and columns, from `img_shapes`. Reference images follow it and count as
    text. Layered makes several images, which count as frames; its last is the reference."""
    sizes = arguments["img_shapes"][0]
    sizes = sizes if isinstance(sizes, list) else [sizes]
    targets = sizes[:-1] if transformer.config.use_layer3d_rope else sizes[:1]
    (_, height, width), frames = targets[0], sum(size[0] for size in targets)
    references = arguments["hidden_states"].shape[1] - frames * height * width
    return Grid(frames, height, width, _lead(transformer, arguments) + references)


def _lead(transformer: torch.nn.Module, arguments: Arguments) -> int:
    return arguments["encoder_hidden_states"].shape[1]


def _layers(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    blocks = enumerate(transformer.transformer_blocks)
    return {f"transformer_blocks.{i}.attn": block.attn for i, block in blocks}


def _refuses(transformer: torch.nn.Module, method: SparseAttention) -> str | None:
    if transformer.config.use_layer3d_rope and isinstance(method, RadialAttention):
        return "it goes by the distance of frames in time, and layers of an image have none"
    return refuses_images(transformer, method)


FAMILY = Family(
    {QwenDoubleStreamAttnProcessor2_0: QwenImageSparseAttnProcessor},
    _layers,
    _grid,
    lead=_lead,
    refuses=_refuses,
    parallel=Parallel(joint=True),
)


class QwenImagePipeline(SparsePipelineMixin, diffusers.QwenImagePipeline):
    """`diffusers.QwenImagePipeline` with `set_attn_processor`."""


class QwenImageImg2ImgPipeline(SparsePipelineMixin, diffusers.QwenImageImg2ImgPipeline):
    """`diffusers.QwenImageImg2ImgPipeline` with `set_attn_processor`."""


class QwenImageInpaintPipeline(SparsePipelineMixin, diffusers.QwenImageInpaintPipeline):
    """`diffusers.QwenImageInpaintPipeline` with `set_attn_processor`."""


class QwenImageEditPipeline(SparsePipelineMixin, diffusers.QwenImageEditPipeline):
    """`diffusers.QwenImageEditPipeline` with `set_attn_processor`."""


class QwenImageEditInpaintPipeline(SparsePipelineMixin, diffusers.QwenImageEditInpaintPipeline):
    """`diffusers.QwenImageEditInpaintPipeline` with `set_attn_processor`."""


class QwenImageEditPlusPipeline(SparsePipelineMixin, diffusers.QwenImageEditPlusPipeline):
    """`diffusers.QwenImageEditPlusPipeline` with `set_attn_processor`."""


class QwenImageLayeredPipeline(SparsePipelineMixin, diffusers.QwenImageLayeredPipeline):
    """`diffusers.QwenImageLayeredPipeline` with `set_attn_processor`."""


class QwenImageControlNetPipeline(SparsePipelineMixin, diffusers.QwenImageControlNetPipeline):
    """`diffusers.QwenImageControlNetPipeline` with `set_attn_processor`; the ControlNet's own
    attention stays dense."""


class QwenImageControlNetInpaintPipeline(
    SparsePipelineMixin, diffusers.QwenImageControlNetInpaintPipeline
):
    """`diffusers.QwenImageControlNetInpaintPipeline` with `set_attn_processor`; the ControlNet's
    own attention stays dense."""
