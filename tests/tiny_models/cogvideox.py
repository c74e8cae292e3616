"""CogVideoX: joint attention, text first, guidance in one batch."""

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from PIL import Image

from tests.tiny_models.parts import BATCH, CALL, Tiny, encoding_once, t5_encoder, t5_tokenizer
from vdit_sparse.pipelines.cogvideox import CogVideoXImageToVideoPipeline, CogVideoXPipeline

# 4 x 8 x 16 tokens and 24 of text; version 1.5 makes two latent frames one token.
SIZE = {"height": 128, "width": 256, "num_frames": 13}
LONG = {**SIZE, "num_frames": 25}
ODD = {"height": 80, "width": 112, "num_frames": 9}
WORDS = {"negative_prompt": "", "guidance_scale": 6.0, "max_sequence_length": 24}


def text_to_video(size: dict, **config) -> Tiny:
    return Tiny(CogVideoXPipeline(**_parts(**config)), {**CALL, **size, **WORDS}, ODD)


def image_to_video() -> Tiny:
    pipe = CogVideoXImageToVideoPipeline(**_parts(in_channels=8))
    encoding_once(pipe.vae)
    image = Image.new("RGB", (64, 64), "red")
    call = {**CALL, **SIZE, **WORDS, "image": image}
    return Tiny(pipe, call, ODD, batch={**BATCH, "image": [image, image]})


def _parts(**config) -> dict:
    torch.manual_seed(0)
    config = {"in_channels": 4, "use_rotary_positional_embeddings": True, **config}
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=32,
        num_layers=2,
        sample_width=32,
        sample_height=16,
        sample_frames=13,
        max_text_seq_length=24,
        **config,
    )
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
    )
    return {
        "tokenizer": t5_tokenizer(),
        "text_encoder": t5_encoder(),
        "vae": vae.eval(),
        "transformer": transformer.eval(),
        "scheduler": CogVideoXDDIMScheduler(),
    }


TINY = {
    "cogvideox": lambda: text_to_video(SIZE, use_rotary_positional_embeddings=False),
    "cogvideox-1.5": lambda: text_to_video(LONG, patch_size_t=2, patch_bias=False),
    "cogvideox-i2v": image_to_video,
}
