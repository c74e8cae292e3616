"""Chroma."""

import diffusers
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor
from torch.nn.functional import pad

from vdit_sparse.pipelines.attach import SparsePipelineMixin
from vdit_sparse.pipelines.families import Family
from vdit_sparse.pipelines.flux_attention import (
    FluxSparseAttnProcessor,
    flux_grid,
    flux_layers,
    flux_lead,
)
from vdit_sparse.pipelines.images import refuses_images

# Channels that carry what the mask adds; kernels want a multiple of 8.
EXTRA = 8


class ChromaSparseAttnProcessor(FluxSparseAttnProcessor):
    """As `FluxAttnProcessor` with Chroma's mask, which masks nothing.

    It is float `[B, 1, S, S]`, 1 between real tokens and else 0, and diffusers adds it to the
    scores: padding weighs 1/e in the rows of real tokens and is a token like any other in its own
    rows. Methods are told by 8 more channels of queries and keys, so their kernels see heads of 136
    channels instead of 128, which costs speed: Hopper's kernel does not take them.
    """

    def keys(self, mask: Tensor | None, query: Tensor) -> None:
        """None: the mask hides no key."""
        if mask is not None and not mask.is_floating_point():
            raise ValueError(
                f"Chroma's attention takes the float mask that its pipelines make, got {mask.dtype}"
                ": under a bool mask the padding's own rows would have no keys at all."
            )

    def sparse(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The mask's row and column of each token as channels whose product is what it adds, less 1
        in rows of real tokens, which their softmax does not see."""
        if mask is None:
            return query, key, value
        real = mask[:, 0].diagonal(dim1=-2, dim2=-1)[..., None, None].to(query.dtype)
        old, new = query.shape[-1], query.shape[-1] + EXTRA
        spread = (*query.shape[:3], EXTRA)
        # Methods scale by new ** -0.5.
        query = torch.cat(
            [query * (new / old) ** 0.5, (real * new**0.5 / EXTRA).expand(spread)], -1
        )
        return query, torch.cat([key, (real - 1).expand(spread)], -1), pad(value, (0, EXTRA))


FAMILY = Family(
    {FluxAttnProcessor: ChromaSparseAttnProcessor},
    flux_layers,
    flux_grid,
    lead=flux_lead,
    refuses=refuses_images,
)


class ChromaPipeline(SparsePipelineMixin, diffusers.ChromaPipeline):
    """`diffusers.ChromaPipeline` with `set_attn_processor`."""


class ChromaImg2ImgPipeline(SparsePipelineMixin, diffusers.ChromaImg2ImgPipeline):
    """`diffusers.ChromaImg2ImgPipeline` with `set_attn_processor`."""


class ChromaInpaintPipeline(SparsePipelineMixin, diffusers.ChromaInpaintPipeline):
    """`diffusers.ChromaInpaintPipeline` with `set_attn_processor`."""
