"""SkyReels-V2: Wan's blocks; under diffusion forcing, one timestep for each frame."""

import torch
from diffusers import SkyReelsV2Transformer3DModel, UniPCMultistepScheduler
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.tiny_models.parts import CALL, Tiny, encoding_once, t5_tokenizer, umt5_encoder, wan_vae
from tests.tiny_models.wan import wan_transformer
from vdit_sparse.pipelines.skyreels_v2 import (
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Pipeline,
)

# 4 x 8 x 16 tokens.
SIZE = {"height": 128, "width": 256, "num_frames": 13}
ODD = {"height": 80, "width": 112, "num_frames": 9}
WORDS = {"negative_prompt": "bad", "guidance_scale": 5.0, "max_sequence_length": 16}


def text_to_video() -> Tiny:
    return Tiny(SkyReelsV2Pipeline(**_parts()), {**CALL, **SIZE, **WORDS}, ODD)


def image_to_video() -> Tiny:
    """Its cross-attention counts on 512 text tokens."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        intermediate_size=16,
        patch_size=2,
    )
    pipe = SkyReelsV2ImageToVideoPipeline(
        image_encoder=CLIPVisionModelWithProjection(vision).eval(),
        image_processor=CLIPImageProcessor(crop_size=32, size=32),
        **_parts(in_channels=36, image_dim=4, added_kv_proj_dim=32),
    )
    encoding_once(pipe.vae)
    image = {"image": Image.new("RGB", (64, 64), "red"), "max_sequence_length": 512}
    return Tiny(pipe, {**CALL, **SIZE, **WORDS, **image}, ODD)


def diffusion_forcing() -> Tiny:
    pipe = SkyReelsV2DiffusionForcingPipeline(**_parts())
    return Tiny(pipe, {**CALL, **SIZE, **WORDS}, ODD)


def _parts(**config) -> dict:
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 8.0}
    return {
        "tokenizer": t5_tokenizer(),
        "text_encoder": umt5_encoder(),
        "vae": wan_vae(),
        "scheduler": UniPCMultistepScheduler(**flow),
        "transformer": wan_transformer(2, 16, kind=SkyReelsV2Transformer3DModel, **config),
    }


TINY = {
    "skyreels-v2": text_to_video,
    "skyreels-v2-i2v": image_to_video,
    "skyreels-v2-forcing": diffusion_forcing,
}
