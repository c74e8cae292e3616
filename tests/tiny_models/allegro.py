"""Allegro: self-attention, text apart, guidance in one batch, heads of 3 x 8."""

import torch
from diffusers import AllegroTransformer3DModel, AutoencoderKLAllegro, DDIMScheduler

from tests.tiny_models.parts import CALL, Tiny, t5_encoder, t5_tokenizer
from vdit_sparse.pipelines.allegro import AllegroPipeline


def text_to_video() -> Tiny:
    torch.manual_seed(0)
    transformer = AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=2,
        cross_attention_dim=48,
        sample_width=32,
        sample_height=16,
        sample_frames=4,
        caption_channels=32,
    )
    torch.manual_seed(0)
    vae = AutoencoderKLAllegro(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=128,
    )
    pipe = AllegroPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=DDIMScheduler(),
    )
    # 6 x 8 x 16 tokens: what is smaller than a tile in any direction is not decoded.
    call = {**CALL, "height": 128, "width": 256, "num_frames": 24, "max_sequence_length": 16}
    call |= {"negative_prompt": "bad", "guidance_scale": 6.0, "clean_caption": False}
    return Tiny(pipe, call, odd={"height": 128, "width": 144, "num_frames": 24})


TINY = {"allegro": text_to_video}
