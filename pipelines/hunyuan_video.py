"""HunyuanVideo (T2V, and I2V with token replacement or concatenated latents)."""

import diffusers
import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from torch import Tensor

from vdit_sparse.grid import Grid
from vdit_sparse.kernels.qk_prepare import prepare_hunyuan
from vdit_sparse.methods import (
    AdaSpaAttention,
    DraftAttention,
    RadialAttention,
    SparseVDiTAttention,
)
from vdit_sparse.pipelines.attach import SparsePipelineMixin
from vdit_sparse.pipelines.families import Arguments, Family, Parallel
from vdit_sparse.pipelines.one_pass import is_one_pass
from vdit_sparse.pipelines.processor import SparseAttnProcessor
from vdit_sparse.pipelines.projections import TEXT, Triple, joined, normalise, project


class HunyuanVideoSparseAttnProcessor(SparseAttnProcessor):
    """As `HunyuanVideoAttnProcessor2_0`: video, then text, in blocks of two streams and of one."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        sizes = (hidden_states.shape[1], encoder_hidden_states.shape[1])
        streams = hidden_states, encoder_hidden_states
        query, key, value = _joint(self, attn, *streams, image_rotary_emb)
        out = self.attend(query, key, value, attention_mask).flatten(2, 3).to(query.dtype)
        video, text = out.split(sizes, dim=1)
        if attn.to_out is not None:
            video = attn.to_out[1](attn.to_out[0](video))
        if attn.to_add_out is not None:
            text = attn.to_add_out(text)
        return video, text


def _joint(
    processor: SparseAttnProcessor,
    attn: Attention,
    video: Tensor,
    text: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
) -> Triple:
    """Queries, keys (after norm and RoPE) and values of video and text, `[B, S, H, D]`; in one
    pass on a GPU where the call is sparse or compiled (`is_one_pass`)."""
    two_streams = attn.add_q_proj is not None
    hidden_states = video if two_streams else torch.cat([video, text], dim=1)
    query, key, value = parts = project(attn, hidden_states)
    norms = (attn.norm_q, attn.norm_k)
    if two_streams:
        norms += (attn.norm_added_q, attn.norm_added_k)
    if is_one_pass(processor, query, norms, RMSNorm, rotary):
        return _in_one_pass(attn, norms, parts, text if two_streams else None, rotary)
    query, key = normalise(query, key, (attn.norm_q, attn.norm_k))
    if rotary is not None:
        query, key = (_rotate(x, video.shape[1], rotary) for x in (query, key))
    if not two_streams:
        return query, key, value
    text_query, text_key, text_value = project(attn, text, TEXT)
    norms = (attn.norm_added_q, attn.norm_added_k)
    text_query, text_key = normalise(text_query, text_key, norms)
    return joined((query, key, value), (text_query, text_key, text_value))


def _in_one_pass(
    attn: Attention,
    norms: tuple[RMSNorm, ...],
    parts: Triple,
    text: Tensor | None,
    rotary: tuple[Tensor, Tensor] | None,
) -> Triple:
    """As `_joint`, of projections `[B, S, H, D]`; text: of a block of two streams, else None."""
    query, key, value = parts
    weights, of_text = [norm.weight for norm in norms], {}
    if text is not None:
        *of_queries_and_keys, text_value = project(attn, text, TEXT)
        of_text["text"] = [x.flatten(2) for x in of_queries_and_keys]
        of_text["text_weights"] = weights[2:]
        value = torch.cat([value, text_value], dim=1)
    given = query.flatten(2), key.flatten(2), *weights[:2], norms[0].eps, rotary
    return *prepare_hunyuan(*given, heads=attn.heads, **of_text), value


def _rotate(x: Tensor, tokens: int, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE on the first `tokens` of x `[B, S, H, D]`: the text has none."""
    video = apply_rotary_emb(x[:, :tokens], rotary, sequence_dim=1)
    return video if x.shape[1] == tokens else torch.cat([video, x[:, tokens:]], dim=1)


def _grid(transformer: torch.nn.Module, arguments: Arguments) -> Grid:
    """Latent tokens of `hidden_states [B, C, F, H, W]`, then those of the prompt, padded."""
    frames, height, width = arguments["hidden_states"].shape[2:]
    patch, text = transformer.config.patch_size, arguments["encoder_hidden_states"].shape[1]
    return Grid(frames // transformer.config.patch_size_t, height // patch, width // patch, text)


def _layers(transformer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {
        f"{stack}.{i}.attn": block.attn
        for stack in ("transformer_blocks", "single_transformer_blocks")
        for i, block in enumerate(getattr(transformer, stack))
    }


def _split(transformer: torch.nn.Module) -> dict:
    """diffusers has no plan for it: prompt and video before the first block, as its other joint
    models. The mask stays whole."""
    tokens, rope = ContextParallelInput(1, 3), ContextParallelInput(0, 2, split_output=True)
    return {
        "rope": {0: rope, 1: rope},
        "transformer_blocks.0": {"hidden_states": tokens, "encoder_hidden_states": tokens},
        "proj_out": ContextParallelOutput(1, 3),
    }


def _unsplit(transformer: torch.nn.Module) -> str | None:
    if transformer.config.image_condition_type == "token_replace":
        return (
            "its blocks take the tokens of the first frame by their number, counted from the "
            "start of what they get"
        )
    return None


# Published settings; 50 steps.
PRESETS = {
    # Radial Attention, scripts/hunyuan_t2v_inference.sh of mit-han-lab/radial-attention at 72788d4,
    # 117 frames of 768x1280: the code keeps no sink, the paper does.
    "radial-hunyuan": RadialAttention(decay=0.95, sink_frames=0, dense_steps=12),
    # 509 frames of 720x1280, with the authors' long-video LoRA.
    "radial-hunyuan-long": RadialAttention(decay=1.0, dense_layers=2, dense_steps=2),
    # The paper, 129 frames of 720x1280. Needs a calibration.
    "sparse-vdit-hunyuan": SparseVDiTAttention(dense_steps=10),
    # The paper, 129 frames of 720x1280.
    "adaspa-hunyuan": AdaSpaAttention(
        density=0.2,
        block=64,
        dense_steps=10,
        refresh=(10, 30),
        recall_eval="base",
        recall_threshold=0.8,
    ),
    # 129 frames of 768x1280: dense steps of the paper, dense layers and density of
    # shawnricecake/draft-attention at f3c81d5.
    "draft-hunyuan": DraftAttention(density=0.1, dense_steps=0.25, dense_layers=2),
}

FAMILY = Family(
    {HunyuanVideoAttnProcessor2_0: HunyuanVideoSparseAttnProcessor},
    _layers,
    _grid,
    presets=PRESETS,
    parallel=Parallel(joint=True, plan=_split, refuses=_unsplit),
)


class HunyuanVideoPipeline(SparsePipelineMixin, diffusers.HunyuanVideoPipeline):
    """`diffusers.HunyuanVideoPipeline` with `set_attn_processor`."""

    generation = {"fps": 15}


class HunyuanVideoImageToVideoPipeline(
    SparsePipelineMixin, diffusers.HunyuanVideoImageToVideoPipeline
):
    """`diffusers.HunyuanVideoImageToVideoPipeline` with `set_attn_processor`."""

    generation = {"fps": 15}
