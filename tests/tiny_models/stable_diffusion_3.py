"""Stable Diffusion 3: images, text last and not masked, a second attention without it in 3.5."""

import torch
from diffusers import SD3Transformer2DModel

from tests.tiny_models.parts import (
    CALL,
    Tiny,
    clip_encoder,
    clip_tokenizer,
    flow,
    image_vae,
    t5_encoder,
    t5_tokenizer,
)
from vdit_sparse.pipelines.stable_diffusion_3 import StableDiffusion3Pipeline

REFUSED = {"radial": "one frame"}


def text_to_image(**config) -> Tiny:
    """16 x 24 tokens and 77 + 16 of text, guidance in one batch."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=32,
        **config,
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=flow(),
        vae=image_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        text_encoder=clip_encoder(projection=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(projection=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(64),
        tokenizer_3=t5_tokenizer(),
    )
    call = {**CALL, "negative_prompt": "bad", "guidance_scale": 5.0, "max_sequence_length": 16}
    call |= {"height": 32, "width": 48}
    return Tiny(pipe, call, {"height": 26, "width": 34}, refused=REFUSED)


TINY = {
    "stable-diffusion-3": text_to_image,
    "stable-diffusion-3.5": lambda: text_to_image(qk_norm="rms_norm", dual_attention_layers=(0,)),
}
