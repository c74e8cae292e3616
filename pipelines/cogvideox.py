"""CogVideoX and CogVideoX 1.5 (text, image and video to video)."""

import diffusers
import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention_processor import (
    Attention,
    CogVideoXAttnProcessor2_0,
    FusedCogVideoXAttnProcessor2_0,
)
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from vdit_sparse.grid import Grid
from vdit_sparse.methods import (
    AdaSpaAttention,
    PAROAttention,
    RettentionAttention,
    SparseVDiTAttention,
)
from vdit_sparse.pipelines.attach import SparsePipelineMixin
from vdit_sparse.pipelines.families import Arguments, Family, Parallel
from vdit_sparse.pipelines.processor import SDPASparseAttnProcessor
from vdit_sparse.pipelines.projections import normalise, project


class CogVideoXSparseAttnProcessor(SDPASparseAttnProcessor):
    """As `CogVideoXAttnProcessor2_0`: text, then video, through the same projections."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if attention_mask is not None:
            raise ValueError("CogVideoX's self-attention takes no mask.")
        text = encoder_hidden_states.shape[1]
        query, key, value = project(attn, torch.cat([encoder_hidden_states, hidden_states], dim=1))
        query, key = normalise(query, key, (attn.norm_q, attn.norm_k))
        if image_rotary_emb is not None:  # the 2B model has none
            query, key = (_rotate(x, text, image_rotary_emb) for x in (query, key))
        out = self.attend(query, key, value).flatten(2, 3)
        out = attn.to_out[1](attn.to_out[0](out))
        return out[:, text:], out[:, :text]


def _rotate(x: Tensor, text: int, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE on x `[B, S, H, D]` but for its first `text` tokens."""
    video = apply_rotary_emb(x[:, text:], rotary, sequence_dim=1)
    return torch.cat([x[:, :text], video], dim=1)


def _grid(transformer: torch.nn.Module, arguments: Arguments) -> Grid:
    """Latent tokens of `hidden_states [B, F, C, H, W]`, and those of the prompt before them."""
    _, frames, _, height, width = arguments["hidden_states"].shape
    patch, patch_t = transformer.config.patch_size, transformer.config.patch_size_t or 1
    return Grid(-(-frames // patch_t), height // patch, width // patch, _lead(None, arguments))


def _lead(transformer: torch.nn.Module, arguments: Arguments) -> int:
    return arguments["encoder_hidden_states"].shape[1]


def _layers(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    blocks = enumerate(transformer.transformer_blocks)
    return {f"transformer_blocks.{i}.attn1": block.attn1 for i, block in blocks}


def _split(transformer: torch.nn.Module) -> dict:
    """diffusers has no plan for it: prompt and video before the first block, as its other joint
    models."""
    tokens, rope = ContextParallelInput(1, 3), ContextParallelInput(0, 2)
    return {
        "transformer_blocks.0": {"hidden_states": tokens, "encoder_hidden_states": tokens},
        "transformer_blocks.*": {"image_rotary_emb": (rope, rope)},
        "proj_out": ContextParallelOutput(1, 3),
    }


# Published settings; 50 steps unless said otherwise.
PRESETS = {
    # The paper, CogVideoX 1.5, 81 frames of 768x1360; it needs no dense steps there. Needs a
    # calibration.
    "sparse-vdit-cogvideox1.5": SparseVDiTAttention(dense_steps=0),
    # The paper, CogVideoX 1.5, 161 frames of 720p.
    "adaspa-cogvideox1.5": AdaSpaAttention(
        density=0.2,
        block=64,
        dense_steps=10,
        refresh=(10, 30),
        recall_eval="base",
        recall_threshold=0.8,
    ),
    # The paper, CogVideoX-5B, 49 frames of 480x720, 30 steps. Needs a calibration.
    "paro-cogvideox": PAROAttention(dense_steps=0),
    # The authors' code, CogVideoX-2B, 49 frames of 480x720. Their band is of tokens (mask="token",
    # slow), ours of blocks.
    "rettention-cogvideox": RettentionAttention(density=0.0625, dense_steps=15, refresh=5),
}

FAMILY = Family(
    {
        CogVideoXAttnProcessor2_0: CogVideoXSparseAttnProcessor,
        FusedCogVideoXAttnProcessor2_0: CogVideoXSparseAttnProcessor,
    },
    _layers,
    _grid,
    lead=_lead,
    presets=PRESETS,
    parallel=Parallel(joint=True, plan=_split),
)


class CogVideoXPipeline(SparsePipelineMixin, diffusers.CogVideoXPipeline):
    """`diffusers.CogVideoXPipeline` with `set_attn_processor`."""

    generation = {"fps": 8}


class CogVideoXImageToVideoPipeline(SparsePipelineMixin, diffusers.CogVideoXImageToVideoPipeline):
    """`diffusers.CogVideoXImageToVideoPipeline` with `set_attn_processor`."""

    generation = {"fps": 8}


class CogVideoXVideoToVideoPipeline(SparsePipelineMixin, diffusers.CogVideoXVideoToVideoPipeline):
    """`diffusers.CogVideoXVideoToVideoPipeline` with `set_attn_processor`."""

    generation = {"fps": 8}
