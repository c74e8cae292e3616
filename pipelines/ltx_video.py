"""LTX-Video (text, image and condition to video, long videos of several prompts)."""

import diffusers
import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.transformers.transformer_ltx import (
    LTXAttention,
    LTXVideoAttnProcessor,
    apply_rotary_emb,
)
from torch import Tensor

from vdit_sparse.grid import Grid
from vdit_sparse.pipelines.attach import SparsePipelineMixin
from vdit_sparse.pipelines.families import Arguments, Family, Parallel
from vdit_sparse.pipelines.processor import SparseAttnProcessor
from vdit_sparse.pipelines.video_coords import find_video


class LTXVideoSparseAttnProcessor(SparseAttnProcessor):
    """Self-attention of a block: as `LTXVideoAttnProcessor`, but for the attention itself."""

    def __call__(
        self,
        attn: LTXAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("LTX-Video's self-attention takes neither encoder states nor a mask.")
        query = attn.norm_q(attn.to_q(hidden_states))
        key = attn.norm_k(attn.to_k(hidden_states))
        value = attn.to_v(hidden_states)
        if image_rotary_emb is not None:
            query, key = (apply_rotary_emb(x, image_rotary_emb) for x in (query, key))
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        out = self.attend(query, key, value).flatten(2, 3).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](out))


def _place(arguments: Arguments) -> tuple[Grid, int]:
    """The grid, and how many condition tokens stand before it. Pipelines with conditions give the
    coordinates of all tokens; the others the latent sizes."""
    coords = arguments.get("video_coords")
    if coords is not None:
        return find_video(coords[0])
    return Grid(*(arguments[name] for name in ("num_frames", "height", "width"))), 0


def _grid(transformer: torch.nn.Module, arguments: Arguments) -> Grid:
    return _place(arguments)[0]


def _lead(transformer: torch.nn.Module, arguments: Arguments) -> int:
    return _place(arguments)[1]


def _layers(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    blocks = enumerate(transformer.transformer_blocks)
    return {f"transformer_blocks.{i}.attn1": block.attn1 for i, block in blocks}


def _split(transformer: torch.nn.Module) -> dict:
    """As the class's own plan, but that every process keeps the whole prompt (split, its mask no
    longer fits the heads), and that the timesteps of image to video, one a token, are split too."""
    rope = ContextParallelInput(1, 3, split_output=True)
    return {
        "": {"hidden_states": ContextParallelInput(1, 3), "timestep": ContextParallelInput(1, 2)},
        "rope": {0: rope, 1: rope},
        "proj_out": ContextParallelOutput(1, 3),
    }


FAMILY = Family(
    {LTXVideoAttnProcessor: LTXVideoSparseAttnProcessor},
    _layers,
    _grid,
    lead=_lead,
    parallel=Parallel(plan=_split),
)


class LTXPipeline(SparsePipelineMixin, diffusers.LTXPipeline):
    """`diffusers.LTXPipeline` with `set_attn_processor`."""

    generation = {"fps": 25}


class LTXImageToVideoPipeline(SparsePipelineMixin, diffusers.LTXImageToVideoPipeline):
    """`diffusers.LTXImageToVideoPipeline` with `set_attn_processor`."""

    generation = {"fps": 25}


class LTXConditionPipeline(SparsePipelineMixin, diffusers.LTXConditionPipeline):
    """`diffusers.LTXConditionPipeline` with `set_attn_processor`."""

    generation = {"fps": 25}


class LTXI2VLongMultiPromptPipeline(SparsePipelineMixin, diffusers.LTXI2VLongMultiPromptPipeline):
    """`diffusers.LTXI2VLongMultiPromptPipeline` with `set_attn_processor`."""

    generation = {"fps": 25}
