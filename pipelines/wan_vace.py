"""Wan VACE: video from references, masks and control videos, by a second stack of blocks."""

import diffusers
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from vdit_sparse.pipelines.attach import SparsePipelineMixin
from vdit_sparse.pipelines.families import Family
from vdit_sparse.pipelines.wan_attention import WanSparseAttnProcessor, latent_grid


def _layers(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The control blocks, which run first, then the others: both attend over the whole video, of
    which reference images are the first frames."""
    return {
        f"{stack}.{i}.attn1": block.attn1
        for stack in ("vace_blocks", "blocks")
        for i, block in enumerate(getattr(transformer, stack))
    }


FAMILY = Family({WanAttnProcessor: WanSparseAttnProcessor}, _layers, latent_grid)


class WanVACEPipeline(SparsePipelineMixin, diffusers.WanVACEPipeline):
    """`diffusers.WanVACEPipeline` with `set_attn_processor`."""
