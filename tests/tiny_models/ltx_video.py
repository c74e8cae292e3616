"""LTX-Video: packed latents, guidance in one batch, conditions as tokens before the video."""

import torch
from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from PIL import Image

from tests.tiny_models.parts import (
    BATCH,
    CALL,
    Tiny,
    encoding_once,
    flow,
    t5_encoder,
    t5_tokenizer,
)
from vdit_sparse.pipelines.ltx_video import (
    LTXConditionPipeline,
    LTXImageToVideoPipeline,
    LTXPipeline,
)

# 4 x 8 x 16 tokens: the tiny VAE makes 8 x 8 x 8 pixels one.
SIZE = {"height": 64, "width": 128, "num_frames": 25}
ODD = {"height": 96, "width": 160, "num_frames": 17}
WORDS = {"negative_prompt": "", "guidance_scale": 3.0, "max_sequence_length": 16}
RED = Image.new("RGB", (128, 64), "red")


def text_to_video() -> Tiny:
    return Tiny(LTXPipeline(**parts()), {**CALL, **SIZE, **WORDS}, ODD, batch=TWO)


def image_to_video() -> Tiny:
    pipe = LTXImageToVideoPipeline(**parts())
    call = {**CALL, **SIZE, **WORDS, "image": RED}
    return Tiny(pipe, call, ODD, batch={**TWO, "image": torch.zeros(2, 3, 64, 128)})


def conditions() -> Tiny:
    """Conditions on later frames come in tokens, before the video; it takes no two prompts then."""
    pipe = LTXConditionPipeline(**parts())
    images = [LTXVideoCondition(image=RED, frame_index=frame) for frame in (0, 8, 16)]
    return Tiny(pipe, {**CALL, **SIZE, **WORDS, "conditions": images}, ODD, batch={})


TWO = {**BATCH, "negative_prompt": ["", "bad"]}


def parts() -> dict:
    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    )
    torch.manual_seed(0)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, True, False),
        decoder_spatio_temporal_scaling=(True, True, True, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
    )
    return {
        "scheduler": flow(),
        "vae": encoding_once(vae.eval()),
        "text_encoder": t5_encoder(),
        "tokenizer": t5_tokenizer(),
        "transformer": transformer.eval(),
    }


TINY = {
    "ltx-video": text_to_video,
    "ltx-video-i2v": image_to_video,
    "ltx-video-conditions": conditions,
}
