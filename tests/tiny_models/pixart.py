"""PixArt: images, self-attention without norms and RoPE, guidance in one batch."""

import torch
from diffusers import DDIMScheduler, PixArtTransformer2DModel

from tests.tiny_models.parts import CALL, Tiny, image_vae, t5_encoder, t5_tokenizer
from vdit_sparse.pipelines.pixart import PixArtAlphaPipeline, PixArtSigmaPipeline


def tiny(kind: type) -> Tiny:
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=32,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=32,
        cross_attention_dim=32,
    )
    pipe = kind(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=image_vae(),
        transformer=transformer.eval(),
        scheduler=DDIMScheduler(),
    )
    # 16 x 24 tokens.
    call = {**CALL, "height": 32, "width": 48, "max_sequence_length": 16, "clean_caption": False}
    call |= {"negative_prompt": "bad", "guidance_scale": 4.5, "use_resolution_binning": False}
    return Tiny(pipe, call, {"height": 24, "width": 40}, refused={"radial": "one frame"})


TINY = {
    "pixart-alpha": lambda: tiny(PixArtAlphaPipeline),
    "pixart-sigma": lambda: tiny(PixArtSigmaPipeline),
}
