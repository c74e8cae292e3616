"""FLUX.1 (dev, schnell, Kontext, Fill)."""

import diffusers
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

from vdit_sparse.methods import PAROAttention
from vdit_sparse.pipelines.attach import SparsePipelineMixin
from vdit_sparse.pipelines.families import Family, Parallel
from vdit_sparse.pipelines.flux_attention import (
    FluxSparseAttnProcessor,
    flux_grid,
    flux_layers,
    flux_lead,
)
from vdit_sparse.pipelines.images import FEW_STEPS, refuses_images

PRESETS = {
    # The paper, FLUX.1-dev, 1024x1024, 30 steps. Needs a calibration.
    "paro-flux": PAROAttention(dense_steps=0),
    "draft-flux-few-steps": FEW_STEPS,
}

FAMILY = Family(
    {FluxAttnProcessor: FluxSparseAttnProcessor},
    flux_layers,
    flux_grid,
    lead=flux_lead,
    refuses=refuses_images,
    presets=PRESETS,
    parallel=Parallel(joint=True),
)


class FluxPipeline(SparsePipelineMixin, diffusers.FluxPipeline):
    """`diffusers.FluxPipeline` with `set_attn_processor`."""


class FluxFillPipeline(SparsePipelineMixin, diffusers.FluxFillPipeline):
    """`diffusers.FluxFillPipeline` with `set_attn_processor`."""


class FluxKontextPipeline(SparsePipelineMixin, diffusers.FluxKontextPipeline):
    """`diffusers.FluxKontextPipeline` with `set_attn_processor`."""
