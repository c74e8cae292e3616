"""SkyReels-V2 (T2V, I2V, and diffusion forcing from text, image and video)."""

import diffusers
import torch
from diffusers.models.transformers.transformer_skyreels_v2 import (
    SkyReelsV2Attention,
    SkyReelsV2AttnProcessor,
)
from torch import Tensor

from vdit_sparse.method import SparseAttention
from vdit_sparse.pipelines.attach import SparsePipelineMixin
from vdit_sparse.pipelines.families import Arguments, Family
from vdit_sparse.pipelines.processor import SparseAttnProcessor
from vdit_sparse.pipelines.wan_attention import latent_grid, query_key_value

CAUSAL = (
    "its attention is causal over blocks of frames (num_frame_per_block is more than 1, which "
    "causal_block_size sets), and methods know no mask of queries"
)


class SkyReelsV2SparseAttnProcessor(SparseAttnProcessor):
    """Self-attention of a block: as `SkyReelsV2AttnProcessor`, but for the attention itself."""

    def __call__(
        self,
        attn: SkyReelsV2Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None:
            raise ValueError("SkyReels-V2's self-attention takes no encoder states.")
        query, key, value = query_key_value(attn, hidden_states, rotary_emb, self)
        out = self.attend(query, key, value, attention_mask).flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](out))

    def keys(self, mask: Tensor | None, query: Tensor) -> None:
        """All keys. Raises ValueError for a mask, which a call can switch on after `apply`."""
        if mask is not None:
            raise ValueError(
                f"No sparse attention here: {CAUSAL}. Leave causal_block_size out, or take the "
                "method out with vdit_sparse.remove."
            )


def _layers(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {f"blocks.{i}.attn1": block.attn1 for i, block in enumerate(transformer.blocks)}


def _timestep(arguments: Arguments) -> Tensor:
    """Under diffusion forcing every frame has its own timestep `[B, F]`, below 1000. A step lowers
    the largest, or that of some frames while others wait; a new part of a long video begins with
    the largest again, but with frames of before that are clean: so by the largest first, then by
    the mean. The pipeline steps copies of its scheduler, so that there is no index to count by."""
    timestep = arguments["timestep"].cpu().double()
    return 1000 * timestep.max() + timestep.mean()


def _steps(pipe: diffusers.DiffusionPipeline) -> int | None:
    """Where frames lag behind each other (`ar_step`), more steps than timesteps."""
    return getattr(pipe, "num_timesteps", None)


def _refuses(transformer: torch.nn.Module, method: SparseAttention) -> str | None:
    return CAUSAL if transformer.config.num_frame_per_block > 1 else None


FAMILY = Family(
    {SkyReelsV2AttnProcessor: SkyReelsV2SparseAttnProcessor},
    _layers,
    latent_grid,
    timestep=_timestep,
    steps=_steps,
    refuses=_refuses,
)


class SkyReelsV2Pipeline(SparsePipelineMixin, diffusers.SkyReelsV2Pipeline):
    """`diffusers.SkyReelsV2Pipeline` with `set_attn_processor`."""

    generation = {"fps": 24}


class SkyReelsV2ImageToVideoPipeline(SparsePipelineMixin, diffusers.SkyReelsV2ImageToVideoPipeline):
    """`diffusers.SkyReelsV2ImageToVideoPipeline` with `set_attn_processor`."""

    generation = {"fps": 24}


class SkyReelsV2DiffusionForcingPipeline(
    SparsePipelineMixin, diffusers.SkyReelsV2DiffusionForcingPipeline
):
    """`diffusers.SkyReelsV2DiffusionForcingPipeline` with `set_attn_processor`."""

    generation = {"fps": 24}


class SkyReelsV2DiffusionForcingImageToVideoPipeline(
    SparsePipelineMixin, diffusers.SkyReelsV2DiffusionForcingImageToVideoPipeline
):
    """`diffusers.SkyReelsV2DiffusionForcingImageToVideoPipeline` with `set_attn_processor`."""

    generation = {"fps": 24}


class SkyReelsV2DiffusionForcingVideoToVideoPipeline(
    SparsePipelineMixin, diffusers.SkyReelsV2DiffusionForcingVideoToVideoPipeline
):
    """`diffusers.SkyReelsV2DiffusionForcingVideoToVideoPipeline` with `set_attn_processor`."""

    generation = {"fps": 24}
