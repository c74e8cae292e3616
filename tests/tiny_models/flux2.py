"""FLUX.2: images, text first, reference images last, blocks of one stream with a fused MLP."""

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from PIL import Image

from tests.tiny_models.parts import (
    CALL,
    Tiny,
    encoding_once,
    flow,
    qwen3_encoder,
    qwen_tokenizer,
    t5_encoder,
    t5_tokenizer,
)
from vdit_sparse.pipelines.flux2 import Flux2KleinPipeline, Flux2Pipeline

# 16 x 24 tokens and 16 of text; the reference has 16 x 16.
SIZE = {"height": 64, "width": 96}
ODD = {"height": 52, "width": 68}
REFUSED = {"radial": "one frame"}


def dev() -> Tiny:
    """With a reference image. The text encoder, Mistral 3, is too large to imitate: embeddings."""
    parts = {"text_encoder": t5_encoder(), "tokenizer": t5_tokenizer()}
    pipe = Flux2Pipeline(**parts, **_parts())
    encoding_once(pipe.vae)
    call = {**CALL, **SIZE, **_embeds(1), "prompt": None, "image": Image.new("RGB", (64, 64))}
    return Tiny(pipe, call, ODD, batch=_embeds(2), refused=REFUSED)


def klein() -> Tiny:
    """The undistilled one, with real guidance: two calls a step."""
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    parts = {"text_encoder": qwen3_encoder(16), "tokenizer": tokenizer}
    pipe = Flux2KleinPipeline(**parts, **_parts(guidance_embeds=False))
    call = {**CALL, **SIZE, "max_sequence_length": 16, "text_encoder_out_layers": (0, 1, 2)}
    return Tiny(pipe, call, ODD, refused=REFUSED)


def _embeds(rows: int) -> dict:
    seeded = torch.Generator().manual_seed(1)
    return {"prompt_embeds": torch.randn(rows, 16, 48, generator=seeded)}


def _parts(**config) -> dict:
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        **config,
    )
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    return {"scheduler": flow(), "vae": vae.eval(), "transformer": transformer.eval()}


TINY = {"flux2-dev": dev, "flux2-klein": klein}
