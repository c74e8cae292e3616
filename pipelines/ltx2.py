"""LTX-2, 2.3 and 2.5 (text, image, conditions and references to video with sound)."""

import diffusers
import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.transformers.transformer_ltx2 import (
    LTX2Attention,
    LTX2AudioVideoAttnProcessor,
    LTX2PerturbedAttnProcessor,
    apply_interleaved_rotary_emb,
    apply_split_rotary_emb,
)
from torch import Tensor

from vdit_sparse.grid import Grid
from vdit_sparse.pipelines.attach import SparsePipelineMixin
from vdit_sparse.pipelines.families import Arguments, Family, Parallel
from vdit_sparse.pipelines.processor import SparseAttnProcessor
from vdit_sparse.pipelines.video_coords import find_video

ROTATE = {"interleaved": apply_interleaved_rotary_emb, "split": apply_split_rotary_emb}


class LTX2SparseAttnProcessor(SparseAttnProcessor):
    """Self-attention of the video, as `LTX2PerturbedAttnProcessor`; without a perturbation that is
    `LTX2AudioVideoAttnProcessor`. A layer that is perturbed for all rows attends to nothing, so it
    is no call of the method."""

    def __call__(
        self,
        attn: LTX2Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: tuple[Tensor, Tensor] | None = None,
        key_rotary_emb: tuple[Tensor, Tensor] | None = None,
        perturbation_mask: Tensor | None = None,
        all_perturbed: bool | Tensor | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None or key_rotary_emb is not None:
            raise ValueError("LTX-2's video self-attention takes neither encoder states nor keys.")
        if attention_mask is not None:
            raise ValueError(
                "Sparse attention knows no strength of attention between video and references: "
                "leave conditioning_attention_strength at 1 and conditioning_attention_mask out, "
                "or take the method out with vdit_sparse.remove."
            )
        if all_perturbed is None:
            all_perturbed = perturbation_mask is not None and torch.all(perturbation_mask == 0)
        out = value = attn.to_v(hidden_states)
        if not all_perturbed:
            out = self._attended(attn, hidden_states, value, query_rotary_emb)
            if perturbation_mask is not None:
                out = torch.lerp(value, out, perturbation_mask)
        return attn.to_out[1](attn.to_out[0](_gated(attn, out, hidden_states)))

    def _attended(
        self,
        attn: LTX2Attention,
        hidden_states: Tensor,
        value: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        query = attn.norm_q(attn.to_q(hidden_states))
        key = attn.norm_k(attn.to_k(hidden_states))
        if rotary is not None:
            query, key = (ROTATE[attn.rope_type](x, rotary) for x in (query, key))
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        return self.attend(query, key, value).flatten(2, 3).to(query.dtype)


def _gated(attn: LTX2Attention, out: Tensor, hidden_states: Tensor) -> Tensor:
    """out `[B, S, H * D]`, each head times its gate (from LTX-2.3 on), 1 at logits of zero."""
    if attn.to_gate_logits is None:
        return out
    gates = 2.0 * torch.sigmoid(attn.to_gate_logits(hidden_states))
    return (out.unflatten(2, (attn.heads, -1)) * gates.unsqueeze(-1)).flatten(2, 3)


def _grid(transformer: torch.nn.Module, arguments: Arguments) -> Grid:
    """The video, and after it the tokens of conditions, keyframes and references. Pipelines with
    generated keyframes give coordinates only, the others the latent sizes too."""
    sizes = [arguments.get(name) for name in ("num_frames", "height", "width")]
    if None in sizes:
        starts, ends = arguments["video_coords"][0].unbind(-1)
        return find_video(starts, ends[0])[0]
    config = transformer.config
    patches = (config.patch_size_t, config.patch_size, config.patch_size)
    video = Grid(*(-(-size // patch) for size, patch in zip(sizes, patches, strict=True)))
    text = arguments["hidden_states"].shape[1] - video.tokens
    return Grid(video.frames, video.height, video.width, text)


def _layers(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    blocks = enumerate(transformer.transformer_blocks)
    return {f"transformer_blocks.{i}.attn1": block.attn1 for i, block in blocks}


def _split(transformer: torch.nn.Module) -> dict:
    """As the class's own plan, but that every process keeps the whole prompt and sound, that the
    timesteps of image to video, one a token, and the video's places in the cross-attention to the
    sound are split too, and that it knows both forms of RoPE."""
    dim, dims = (2, 4) if transformer.config.rope_type == "split" else (1, 3)
    rope = ContextParallelInput(dim, dims, split_output=True)
    tokens = ContextParallelInput(1, 3)
    return {
        "": {"hidden_states": tokens, "timestep": ContextParallelInput(1, 2)},
        "rope": {0: rope, 1: rope},
        "cross_attn_rope": {0: rope, 1: rope},
        "proj_out": ContextParallelOutput(1, 3),
    }


FAMILY = Family(
    {
        LTX2AudioVideoAttnProcessor: LTX2SparseAttnProcessor,
        LTX2PerturbedAttnProcessor: LTX2SparseAttnProcessor,
    },
    _layers,
    _grid,
    parallel=Parallel(plan=_split, exchanging=("video_to_audio_attn",)),
)


class LTX2Pipeline(SparsePipelineMixin, diffusers.LTX2Pipeline):
    """`diffusers.LTX2Pipeline` with `set_attn_processor`."""

    generation = {"fps": 24}


class LTX2ImageToVideoPipeline(SparsePipelineMixin, diffusers.LTX2ImageToVideoPipeline):
    """`diffusers.LTX2ImageToVideoPipeline` with `set_attn_processor`."""

    generation = {"fps": 24}


class LTX2ConditionPipeline(SparsePipelineMixin, diffusers.LTX2ConditionPipeline):
    """`diffusers.LTX2ConditionPipeline` with `set_attn_processor`."""

    generation = {"fps": 24}


class LTX2InContextPipeline(SparsePipelineMixin, diffusers.LTX2InContextPipeline):
    """`diffusers.LTX2InContextPipeline` with `set_attn_processor`."""

    generation = {"fps": 24}


class LTX2HDRPipeline(SparsePipelineMixin, diffusers.LTX2HDRPipeline):
    """`diffusers.LTX2HDRPipeline` with `set_attn_processor`."""

    generation = {"fps": 24}


class LTX2DFRPipeline(SparsePipelineMixin, diffusers.LTX2DFRPipeline):
    """`diffusers.LTX2DFRPipeline` with `set_attn_processor`."""

    generation = {"fps": 24}


class LTX2DFRTemporalRefinePipeline(SparsePipelineMixin, diffusers.LTX2DFRTemporalRefinePipeline):
    """`diffusers.LTX2DFRTemporalRefinePipeline` with `set_attn_processor`."""

    generation = {"fps": 24}
