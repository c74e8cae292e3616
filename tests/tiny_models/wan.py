"""Wan 2.1 and 2.2."""

import torch
from diffusers import WanTransformer3DModel
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from tests.tiny_models.parts import (
    CALL,
    Tiny,
    encoding_once,
    flow,
    t5_tokenizer,
    umt5_encoder,
    wan_vae,
)
from vdit_sparse.pipelines.wan import WanImageToVideoPipeline, WanPipeline

# 5 x 8 x 8 = 320 tokens: five blocks of 64.
WAN_CALL = {
    "prompt": "a cat runs",
    "negative_prompt": "bad",
    "height": 128,
    "width": 128,
    "num_frames": 17,
    "num_inference_steps": 3,
    "guidance_scale": 5.0,
    "max_sequence_length": 16,
    "output_type": "latent",
}


def tiny_wan(*, layers: int = 2, head_dim: int = 16, experts: int = 1, **config) -> WanPipeline:
    """Wan text-to-video; `experts=2` is Wan 2.2 with a transformer for each noise range, and
    `expand_timesteps=True` its TI2V form with one timestep a token."""
    if experts == 2:
        config = {"boundary_ratio": 0.875, **config}
    second = wan_transformer(layers, head_dim, seed=1) if experts == 2 else None
    pipe = WanPipeline(
        transformer=wan_transformer(layers, head_dim), transformer_2=second, **_parts(), **config
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_wan_i2v(*, layers: int = 2) -> WanImageToVideoPipeline:
    """Wan 2.1 image-to-video. Its cross-attention counts on 512 text tokens."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        intermediate_size=16,
        patch_size=2,
    )
    transformer = wan_transformer(layers, 16, in_channels=36, image_dim=4, added_kv_proj_dim=32)
    pipe = WanImageToVideoPipeline(
        image_encoder=CLIPVisionModel(vision).eval(),
        image_processor=CLIPImageProcessor(crop_size=32, size=32),
        transformer=transformer,
        **_parts(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


ORANGE = Image.new("RGB", (64, 64), "orange")


def wan_i2v_call() -> dict:
    return {**WAN_CALL, "image": ORANGE, "max_sequence_length": 512}


def wan_transformer(
    layers: int, head_dim: int, *, seed: int = 0, kind: type = WanTransformer3DModel, **config
):
    torch.manual_seed(seed)
    config = {"in_channels": 16, "out_channels": 16, **config}
    return kind(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=head_dim,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64,
        num_layers=layers,
        cross_attn_norm=True,
        rope_max_seq_len=32,
        **config,
    ).eval()


def _parts() -> dict:
    return {
        "tokenizer": t5_tokenizer(),
        "text_encoder": umt5_encoder(),
        "vae": wan_vae(),
        "scheduler": flow(shift=7.0),
    }


def tiny(pipe, **changes) -> Tiny:
    # 4 x 8 x 16 tokens: Radial needs the frames, Re-ttention two tiles in each.
    call = {**WAN_CALL, "width": 256, "num_frames": 13, **CALL, **changes}
    encoding_once(pipe.vae)
    return Tiny(pipe, call, odd={"height": 80, "width": 112, "num_frames": 9})


TINY = {
    "wan": lambda: tiny(tiny_wan()),
    "wan-two-experts": lambda: tiny(tiny_wan(experts=2), num_inference_steps=4),
    "wan-ti2v": lambda: tiny(tiny_wan(expand_timesteps=True)),
    "wan-i2v": lambda: tiny(tiny_wan_i2v(), image=ORANGE, max_sequence_length=512),
}
