"""HunyuanVideo: joint attention, video first, padded text that is masked."""

import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
from PIL import Image
from transformers import CLIPImageProcessor

from tests.tiny_models.parts import (
    CALL,
    Tiny,
    clip_encoder,
    clip_tokenizer,
    encoding_once,
    flow,
    llama_encoder,
    llama_tokenizer,
)
from vdit_sparse.pipelines.hunyuan_video import (
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
)

# 4 x 8 x 16 tokens and 24 of text.
SIZE = {"height": 128, "width": 256, "num_frames": 13}
RED = Image.new("RGB", (64, 64), "red")
ODD = {"height": 80, "width": 112, "num_frames": 9}


def text_to_video() -> Tiny:
    template = {"template": "{}", "crop_start": 0}
    call = {**CALL, **SIZE, "prompt_template": template, "max_sequence_length": 24}
    return Tiny(HunyuanVideoPipeline(**_parts()), call, ODD)


def guided() -> Tiny:
    """With real guidance: two calls a step."""
    made = text_to_video()
    call = {**made.call, "negative_prompt": "bad", "true_cfg_scale": 3.0}
    return Tiny(made.pipe, call, ODD)


def image_to_video(kind: str) -> Tiny:
    """kind: "token_replace" (the first frame is the image) or "latent_concat"."""
    channels = 4 if kind == "token_replace" else 9
    parts = _parts(image_condition_type=kind, in_channels=channels)
    image = CLIPImageProcessor(crop_size=32, size=32)
    pipe = HunyuanVideoImageToVideoPipeline(**parts, image_processor=image)
    call = {
        **CALL,
        **SIZE,
        **_embeds(1),
        "prompt": None,
        "image": Image.new("RGB", (64, 64), "red"),
    }
    encoding_once(pipe.vae)
    return Tiny(pipe, call, ODD, batch={**_embeds(2), "image": [RED, RED]})


def _embeds(rows: int) -> dict:
    seeded = torch.Generator().manual_seed(1)
    mask = torch.arange(24) < torch.tensor([[11], [20]])[:rows]
    return {
        "prompt_embeds": torch.randn(rows, 24, 16, generator=seeded),
        "pooled_prompt_embeds": torch.randn(rows, 8, generator=seeded),
        "prompt_attention_mask": mask,
    }


def _parts(**config) -> dict:
    torch.manual_seed(0)
    config = {"in_channels": 4, **config}
    transformer = HunyuanVideoTransformer3DModel(
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=1,
        num_refiner_layers=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
        **config,
    )
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    return {
        "text_encoder": llama_encoder(16),
        "tokenizer": llama_tokenizer(),
        "transformer": transformer.eval(),
        "vae": vae.eval(),
        "scheduler": flow(shift=7.0),
        "text_encoder_2": clip_encoder(8),
        "tokenizer_2": clip_tokenizer(),
    }


TINY = {
    "hunyuan-video": text_to_video,
    "hunyuan-video-guided": guided,
    "hunyuan-video-token-replace": lambda: image_to_video("token_replace"),
    "hunyuan-video-latent-concat": lambda: image_to_video("latent_concat"),
}
