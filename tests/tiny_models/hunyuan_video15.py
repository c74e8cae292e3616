"""HunyuanVideo 1.5: joint attention, video first, then image, glyphs and prompt, each masked."""

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    HunyuanVideo15Transformer3DModel,
)
from PIL import Image
from transformers import (
    ByT5Tokenizer,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.tiny_models.parts import CALL, Tiny, encoding_once, flow, qwen_tokenizer, t5_encoder
from vdit_sparse.pipelines.hunyuan_video15 import (
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
)


def text_to_video() -> Tiny:
    """The tokens of the image are there, all masked."""
    pipe = HunyuanVideo15Pipeline(**_parts())
    pipe.vision_num_semantic_tokens = 9
    # 4 x 8 x 16 tokens and 24 + 16 + 9 of text.
    size = {"height": 32, "width": 64, "num_frames": 7}
    odd = {"height": 20, "width": 28, "num_frames": 5}
    call = {**CALL, **size, **_embeds(1), "prompt": None}
    return Tiny(pipe, call, odd, batch=_embeds(2))


def image_to_video() -> Tiny:
    """Its size follows the image: 4 x 8 x 15 tokens."""
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=12,
        patch_size=4,
    )
    pipe = HunyuanVideo15ImageToVideoPipeline(
        **_parts(task_type="i2v"),
        image_encoder=SiglipVisionModel(config).eval(),
        feature_extractor=SiglipImageProcessor(size={"height": 12, "width": 12}),
    )
    encoding_once(pipe.vae)
    call = {**CALL, **_embeds(1), "prompt": None, "num_frames": 7}
    call["image"] = Image.new("RGB", (60, 32), "red")
    odd = {"image": Image.new("RGB", (44, 44), "red"), "num_frames": 5}
    return Tiny(pipe, call, odd, batch=_embeds(2))


def _embeds(rows: int) -> dict:
    """Encoded prompts and glyphs of unequal length; only the second prompt has glyphs."""
    seeded = torch.Generator().manual_seed(1)
    embeds = {}
    for name, lengths in {"": [[11], [20]], "negative_": [[5], [5]]}.items():
        embeds |= {
            f"{name}prompt_embeds": torch.randn(rows, 24, 16, generator=seeded),
            f"{name}prompt_embeds_mask": torch.arange(24) < torch.tensor(lengths)[:rows],
            f"{name}prompt_embeds_2": torch.randn(rows, 16, 32, generator=seeded),
            f"{name}prompt_embeds_mask_2": torch.arange(16) < torch.tensor([[0], [7]])[:rows],
        }
    return embeds


def _parts(**config) -> dict:
    torch.manual_seed(0)
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=16,
        text_embed_2_dim=32,
        image_embed_dim=12,
        rope_axes_dim=(4, 6, 6),
        target_size=45,
        **{"task_type": "t2v", **config},
    )
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    torch.manual_seed(0)
    qwen = Qwen2_5_VLTextConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_parameters=rope,
    )
    return {
        "text_encoder": Qwen2_5_VLTextModel(qwen).eval(),
        "tokenizer": qwen_tokenizer(),
        "transformer": transformer.eval(),
        "vae": vae.eval(),
        "scheduler": flow(shift=7.0),
        "text_encoder_2": t5_encoder(),
        "tokenizer_2": ByT5Tokenizer(),
        "guider": ClassifierFreeGuidance(guidance_scale=2.0),
    }


TINY = {
    "hunyuan-video-1.5": text_to_video,
    "hunyuan-video-1.5-image": image_to_video,
}
