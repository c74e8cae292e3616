"""FLUX.1: images, text first, blocks of one stream that do not say where the text ends."""

import torch
from diffusers import FluxTransformer2DModel
from PIL import Image

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
from vdit_sparse.pipelines.flux import FluxFillPipeline, FluxKontextPipeline, FluxPipeline

# 16 x 24 tokens and 16 of text.
SIZE = {"height": 32, "width": 48, "max_sequence_length": 16}
ODD = {"height": 26, "width": 34}
RED = Image.new("RGB", (48, 32), "red")
REFUSED = {"radial": "one frame"}


def text_to_image() -> Tiny:
    return Tiny(FluxPipeline(**_parts()), {**CALL, **SIZE}, ODD, refused=REFUSED)


def guided() -> Tiny:
    """With real guidance: two calls a step."""
    call = {**CALL, **SIZE, "negative_prompt": "bad", "true_cfg_scale": 3.0}
    return Tiny(FluxPipeline(**_parts()), call, ODD, refused=REFUSED)


def fill() -> Tiny:
    """The masked image comes in channels, not in tokens."""
    pipe = FluxFillPipeline(**_parts(in_channels=36, out_channels=16))
    call = {**CALL, **SIZE, "image": RED, "mask_image": Image.new("L", (48, 32), 255)}
    return Tiny(pipe, call, ODD, refused=REFUSED)


def kontext() -> Tiny:
    """The reference image comes in tokens after the target."""
    pipe = FluxKontextPipeline(**_parts())
    call = {**CALL, **SIZE, "image": RED, "max_area": 32 * 48, "_auto_resize": False}
    return Tiny(pipe, call, ODD, refused=REFUSED)


def _parts(**config) -> dict:
    torch.manual_seed(0)
    config = {"in_channels": 16, **config}
    transformer = FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
        **config,
    )
    scale = {"shift_factor": 0.06, "scaling_factor": 1.5}
    return {
        "scheduler": flow(),
        "vae": image_vae(use_quant_conv=False, use_post_quant_conv=False, **scale),
        "text_encoder": clip_encoder(),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": t5_encoder(),
        "tokenizer_2": t5_tokenizer(),
        "transformer": transformer.eval(),
    }


TINY = {
    "flux": text_to_image,
    "flux-guided": guided,
    "flux-fill": fill,
    "flux-kontext": kontext,
}
