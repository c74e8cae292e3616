"""Kandinsky 5: self-attention, text apart, channels last, guidance in two calls."""

import torch
from diffusers import AutoencoderKLHunyuanVideo, Kandinsky5Transformer3DModel
from PIL import Image

from tests.tiny_models.parts import (
    CALL,
    Tiny,
    clip_encoder,
    clip_tokenizer,
    encoding_once,
    flow,
    qwen_tokenizer,
    qwen_vl_encoder,
)
from vdit_sparse.pipelines.kandinsky5 import Kandinsky5I2VPipeline, Kandinsky5T2VPipeline

# 4 x 8 x 16 tokens.
SIZE = {"height": 128, "width": 256, "num_frames": 13}
ODD = {"height": 80, "width": 112, "num_frames": 9}
# RoPE rounds to bf16, where another last bit is 2^-8.
ROUNDED = {"tolerance": 5e-4}


def text_to_video() -> Tiny:
    call = {**CALL, **SIZE, **_embeds(1), "guidance_scale": 2.0}
    return Tiny(Kandinsky5T2VPipeline(**_parts()), call, ODD, batch=_embeds(2), **ROUNDED)


def image_to_video() -> Tiny:
    """The first frame is the image and stays it; more than 4 frames, as it levels the first 4."""
    pipe = Kandinsky5I2VPipeline(**_parts())
    encoding_once(pipe.vae)
    call = {**CALL, **SIZE, **_embeds(1), "guidance_scale": 1.0}
    call |= {"image": Image.new("RGB", (256, 128), "red"), "num_frames": 21}
    odd = {**ODD, "num_frames": 17}
    return Tiny(pipe, call, odd, batch=_embeds(2), **ROUNDED)


def _embeds(rows: int) -> dict:
    """Encoded prompts, and shorter ones to avoid."""
    seeded = torch.Generator().manual_seed(1)
    embeds = {"prompt": None, "negative_prompt": None}
    for name, tokens in {"prompt": 16, "negative_prompt": 9}.items():
        embeds |= {
            f"{name}_embeds_qwen": torch.randn(rows, tokens, 16, generator=seeded),
            f"{name}_embeds_clip": torch.randn(rows, 32, generator=seeded),
            f"{name}_cu_seqlens": torch.arange(rows + 1, dtype=torch.int32) * tokens,
        }
    return embeds


def _parts() -> dict:
    torch.manual_seed(0)
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=16,
        in_text_dim=16,
        in_text_dim2=32,
        time_dim=16,
        out_visual_dim=16,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        visual_cond=True,
    ).eval()
    # Made as zeros, with which no block does anything.
    for name, module in transformer.named_modules():
        if name.endswith("modulation.out_layer"):
            module.weight.data.normal_(std=0.5)
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=16,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    return {
        "transformer": transformer,
        "vae": vae.eval(),
        "text_encoder": qwen_vl_encoder(),
        "tokenizer": qwen_tokenizer(),
        "text_encoder_2": clip_encoder(),
        "tokenizer_2": clip_tokenizer(),
        "scheduler": flow(),
    }


TINY = {
    "kandinsky5": text_to_video,
    "kandinsky5-image-to-video": image_to_video,
}
