"""HiDream: images, joint attention, image first, blocks of one stream, padding that is seen."""

import torch
from diffusers import HiDreamImageTransformer2DModel

from tests.tiny_models.parts import (
    CALL,
    Tiny,
    clip_encoder,
    clip_tokenizer,
    flow,
    image_vae,
    llama_encoder,
    llama_tokenizer,
    t5_encoder,
    t5_tokenizer,
)
from vdit_sparse.pipelines.hidream import HiDreamImagePipeline


def text_to_image(axes: tuple[int, ...] = (4, 6, 6)) -> Tiny:
    """axes: of RoPE; (4, 2, 2) leaves half of the heads' size alone."""
    torch.manual_seed(0)
    transformer = HiDreamImageTransformer2DModel(
        patch_size=8,
        in_channels=4,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[32, 16],
        text_emb_dim=64,
        num_routed_experts=0,
        axes_dims_rope=axes,
        llama_layers=(0, 1, 2),
    )
    scale = {"shift_factor": 0.06, "scaling_factor": 1.5}
    pipe = HiDreamImagePipeline(
        scheduler=flow(),
        vae=image_vae(use_quant_conv=False, use_post_quant_conv=False, **scale),
        text_encoder=clip_encoder(projection=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(projection=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(),
        tokenizer_3=t5_tokenizer(),
        text_encoder_4=llama_encoder(),
        tokenizer_4=llama_tokenizer(),
        transformer=transformer.eval(),
    )
    # The pipeline scales all images to 128 x 128 latents: 16 x 16 tokens, and 3 x 16 of text.
    call = {**CALL, "height": 128, "width": 128, "max_sequence_length": 16}
    call |= {"negative_prompt": "bad", "guidance_scale": 5.0}
    # 12 x 21 tokens, padded to 16 x 16.
    odd = {"height": 96, "width": 168}
    return Tiny(pipe, call, odd, refused={"radial": "one frame"})


TINY = {
    "hidream": text_to_image,
    "hidream-half-rope": lambda: text_to_image((4, 2, 2)),
}
