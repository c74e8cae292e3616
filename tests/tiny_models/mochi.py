"""Mochi: joint attention, video first, text masked row by row, guidance in one batch."""

import torch
from diffusers import AutoencoderKLMochi, MochiTransformer3DModel

from tests.tiny_models.parts import CALL, Tiny, flow, t5_encoder, t5_tokenizer
from vdit_sparse.pipelines.mochi import MochiPipeline


def text_to_video() -> Tiny:
    torch.manual_seed(0)
    transformer = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        pooled_projection_dim=16,
        text_embed_dim=32,
        time_embed_dim=4,
        max_sequence_length=24,
    ).eval()
    # Made as zeros, with which RoPE would be the identity.
    transformer.pos_frequencies.data.normal_()
    torch.manual_seed(0)
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    pipe = MochiPipeline(
        scheduler=flow(invert_sigmas=True),
        vae=vae.eval(),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=transformer,
    )
    # 4 x 8 x 16 tokens and 24 of text.
    call = {**CALL, "height": 128, "width": 256, "num_frames": 19, "max_sequence_length": 24}
    call |= {"negative_prompt": "bad", "guidance_scale": 4.5}
    return Tiny(pipe, call, odd={"height": 80, "width": 112, "num_frames": 7})


TINY = {"mochi": text_to_video}
