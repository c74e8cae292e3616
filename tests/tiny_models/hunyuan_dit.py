"""HunyuanDiT: images, self-attention, U-shaped skips, guidance in one batch."""

import torch
from diffusers import DDPMScheduler, HunyuanDiT2DModel

from tests.tiny_models.parts import CALL, Tiny, image_vae
from vdit_sparse.pipelines.hunyuan_dit import HunyuanDiTPipeline

TEXT, TEXT_T5 = 12, 16


def text_to_image() -> Tiny:
    torch.manual_seed(0)
    transformer = HunyuanDiT2DModel(
        sample_size=16,
        num_layers=4,
        patch_size=2,
        attention_head_dim=16,
        num_attention_heads=2,
        hidden_size=32,
        in_channels=4,
        cross_attention_dim=32,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        text_len=TEXT,
        text_len_t5=TEXT_T5,
        use_style_cond_and_image_meta_size=False,
    )
    levels = {
        "block_out_channels": (8,) * 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    pipe = HunyuanDiTPipeline(
        vae=image_vae(**levels),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer.eval(),
        scheduler=DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    # 16 x 24 tokens.
    call = {**CALL, **_embeds(1), "height": 256, "width": 384, "guidance_scale": 5.0}
    call |= {"prompt": None, "use_resolution_binning": False}
    odd = {"height": 208, "width": 272}
    return Tiny(pipe, call, odd, batch=_embeds(2), refused={"radial": "one frame"})


def _embeds(rows: int) -> dict:
    """Two encoders' prompts of unequal length."""
    seeded = torch.Generator().manual_seed(1)
    embeds = {}
    for sign in ("", "negative_"):
        for number, tokens in {"": TEXT, "_2": TEXT_T5}.items():
            mask = torch.arange(tokens) < torch.tensor([[5], [9]])[:rows]
            states = torch.randn(rows, tokens, 32, generator=seeded)
            embeds[f"{sign}prompt_embeds{number}"] = states
            embeds[f"{sign}prompt_attention_mask{number}"] = mask.long()
    return embeds


TINY = {"hunyuan-dit": text_to_image}
