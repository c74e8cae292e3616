"""Qwen-Image: images, padded text first, reference images after the target."""

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from PIL import Image

from tests.tiny_models.parts import (
    CALL,
    Tiny,
    encoding_once,
    flow,
    qwen_tokenizer,
    qwen_vl_encoder,
)
from vdit_sparse.pipelines.qwen_image import (
    QwenImageEditPipeline,
    QwenImagePipeline,
)

# The pipeline drops as many tokens of its template as come before the prompt with the real
# tokenizer, 34; with this one as a token there are as many here.
TEMPLATE = (
    "e by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)
RED = Image.new("RGB", (64, 64), "red")
GUIDED = {"negative_prompt": "bad", "true_cfg_scale": 2.0}
BATCH = {
    "prompt": ["a cat", "a white dog runs away"],
    "negative_prompt": ["bad", "an ugly dog lies down"],
}
REFUSED = {"radial": "one frame"}


def text_to_image() -> Tiny:
    """16 x 24 tokens, with real guidance: two calls a step."""
    call = {**CALL, **GUIDED, "height": 128, "width": 192, "max_sequence_length": 48}
    odd = {"height": 104, "width": 136}
    return Tiny(QwenImagePipeline(**_parts(2)), call, odd, batch=BATCH, refused=REFUSED)


def edit() -> Tiny:
    """16 x 24 tokens, then 16 x 16 of the image, which has a timestep of its own."""
    pipe = QwenImageEditPipeline(**_parts(5, zero_cond_t=True), processor=qwen_tokenizer())
    encoding_once(pipe.vae)
    call = {**CALL, **_embeds(1), "prompt": None, "image": RED, "height": 1024, "width": 1536}
    odd = {"height": 832, "width": 1088}
    return Tiny(pipe, call, odd, batch=_embeds(2), refused=REFUSED)


def _embeds(rows: int) -> dict:
    seeded = torch.Generator().manual_seed(1)
    mask = torch.arange(24) < torch.tensor([[24], [11]])[:rows]
    return {
        "prompt_embeds": torch.randn(rows, 24, 16, generator=seeded),
        "prompt_embeds_mask": mask.long(),
    }


def qwen_image_transformer(**config) -> QwenImageTransformer2DModel:
    torch.manual_seed(0)
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
        **config,
    ).eval()


def _parts(levels: int, **config) -> dict:
    """levels: of the VAE, each of which halves height and width."""
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1] * (levels + 1),
        num_res_blocks=0,
        temperal_downsample=[False] * levels,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return {
        "scheduler": flow(),
        "vae": vae.eval(),
        "text_encoder": qwen_vl_encoder(),
        "tokenizer": qwen_tokenizer(TEMPLATE),
        "transformer": qwen_image_transformer(**config),
    }


TINY = {
    "qwen-image": text_to_image,
    "qwen-image-edit": edit,
}
