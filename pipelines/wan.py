"""Wan 2.1 and 2.2 (T2V, I2V, TI2V): the layers, the presets and the pipelines."""

import diffusers
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from vdit_sparse.methods import (
    AdaSpaAttention,
    DraftAttention,
    PAROAttention,
    RadialAttention,
    RettentionAttention,
    SparseVDiTAttention,
)
from vdit_sparse.pipelines.attach import SparsePipelineMixin
from vdit_sparse.pipelines.families import Family, Parallel
from vdit_sparse.pipelines.wan_attention import WanSparseAttnProcessor, latent_grid
from vdit_sparse.tuned import TunedAttention


def _layers(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {f"blocks.{i}.attn1": block.attn1 for i, block in enumerate(transformer.blocks)}


# Published settings, but for ours; 50 steps unless said otherwise.
PRESETS = {
    # Radial Attention: scripts/ of mit-han-lab/radial-attention at 72788d4.
    # wan_t2v_inference.sh, 69 frames of 768x1280
    "radial-wan2.1": RadialAttention(decay=0.2, dense_layers=1, dense_steps=12),
    # 161 frames of 720x1280, with the authors' long-video LoRA
    "radial-wan2.1-long": RadialAttention(decay=1.0, dense_layers=2, dense_steps=2),
    # FusionX LoRA, 8 steps, guidance 1
    "radial-wan2.1-8step": RadialAttention(decay=0.2, dense_layers=1, dense_steps=2),
    # LightX2V LoRA, 4 steps, guidance 1
    "radial-wan2.1-4step": RadialAttention(decay=0.2, dense_layers=1, dense_steps=1),
    # Ours: for LoRAs of 4 or 8 steps, guidance 1, with the last step dense as well
    "radial-wan2.1-few-steps": RadialAttention(
        decay=0.2, dense_layers=1, dense_steps=1, last_dense_steps=1
    ),
    # wan_22_t2v_inference.sh, 77 frames of 768x1280, 40 steps
    "radial-wan2.2": RadialAttention(decay=0.8, dense_layers=1, dense_steps=11, block=64),
    # The paper, 75,600 tokens; it does without dense steps on CogVideoX1.5 alone. The file of a
    # calibration belongs into the checkpoint, or into calibration=.
    "sparse-vdit-wan2.1": SparseVDiTAttention(dense_steps=10),
    # The paper's for HunyuanVideo and CogVideoX1.5, with its own rule for heads; it has no Wan.
    "adaspa-wan2.1": AdaSpaAttention(
        density=0.2,
        block=64,
        dense_steps=10,
        refresh=(10, 30),
        recall_eval="base",
        recall_threshold=0.8,
    ),
    # flagos-ai/FlagScale's port at 4d1cccd, examples/wan2_1/conf/inference/1.3b_adaspa.yaml: the
    # 1.3B model, 81 frames of 480x832. It starts sparse and does not output its dense pass.
    "adaspa-wan2.1-flagscale": AdaSpaAttention(
        density=0.1,
        block=128,
        dense_steps=0,
        refresh=(0, 30),
        recall_eval="up",
        recall_threshold=0.9,
        dense_search=False,
        first_frame_sink=True,
        random_share=0.01,
    ),
    # 81 frames of 512x768 and 768x1280: dense steps of the paper, dense layer and density of
    # shawnricecake/draft-attention at f3c81d5. The paper also has density 0.45.
    "draft-wan2.1": DraftAttention(density=0.25, dense_steps=0.25, dense_layers=1),
    # The paper: all of 30 steps are sparse. Needs a calibration, as sparse-vdit-wan2.1 does.
    "paro-wan2.1": PAROAttention(dense_steps=0),
    # The bundled model, 16 steps: a dense quarter, as Radial's authors advise, then near density
    # 0.35, or for Radial the sparsest mask that its rule has for seven frames of 448 tokens, and
    # for Re-ttention the narrowest band of blocks; measured in docs/methods.md. Regions of 16 x 4
    # tokens tile its frames. Its calibrations lie in the checkpoint.
    "radial-mini": RadialAttention(d1="half", sink_frames=0, dense_steps=4, block=64),
    "sparse-vdit-mini": SparseVDiTAttention(dense_steps=4),
    "adaspa-mini": AdaSpaAttention(density=0.35, block=64, dense_steps=4, refresh=(4, 9)),
    "draft-mini": DraftAttention(density=0.35, block=64, pool=(16, 4), dense_steps=4),
    "paro-mini": PAROAttention(dense_steps=4),
    "rettention-mini": RettentionAttention(density=0.1, block=64, dense_steps=4, refresh=4),
    # `vdit-sparse tune --density 0.3625` on the bundled model, docs/tune.md.
    "tuned-mini": TunedAttention(),
    # The same in 4 steps, with a dense first and last one. For AdaSpa and Re-ttention the first is
    # the one that they search or cache, so that as many steps are left to be sparse. Ours, and not
    # measured.
    "radial-mini-fast": RadialAttention(
        d1="half", sink_frames=0, dense_steps=1, last_dense_steps=1, block=64
    ),
    "adaspa-mini-fast": AdaSpaAttention(
        density=0.35, block=64, dense_steps=0, last_dense_steps=1, refresh="once"
    ),
    "draft-mini-fast": DraftAttention(
        density=0.35, block=64, pool=(16, 4), dense_steps=1, last_dense_steps=1
    ),
    "rettention-mini-fast": RettentionAttention(
        density=0.1, block=64, dense_steps=0, last_dense_steps=1, refresh=4
    ),
}

FAMILY = Family(
    {WanAttnProcessor: WanSparseAttnProcessor},
    _layers,
    latent_grid,
    presets=PRESETS,
    parallel=Parallel(),
)


class WanPipeline(SparsePipelineMixin, diffusers.WanPipeline):
    """`diffusers.WanPipeline` with `set_attn_processor`."""


class WanImageToVideoPipeline(SparsePipelineMixin, diffusers.WanImageToVideoPipeline):
    """`diffusers.WanImageToVideoPipeline` with `set_attn_processor`."""
