"""Z-Image: one stream, image first, both filled up to multiples of 32, guidance in one batch."""

import torch
from diffusers import ZImageTransformer2DModel

from tests.tiny_models.parts import CALL, Tiny, flow, image_vae, qwen3_encoder, qwen_tokenizer
from vdit_sparse.pipelines.z_image import ZImagePipeline


def text_to_image() -> Tiny:
    """16 x 24 tokens and 32 of text; 13 x 17 are filled up; a batch has 32 and 64 of text."""
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32],
    ).eval()
    # Made as zeros, with which a token in the wrong place may not show.
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        token.data.normal_()
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    pipe = ZImagePipeline(
        scheduler=flow(),
        vae=image_vae(16, shift_factor=0.0, scaling_factor=1.0),
        text_encoder=qwen3_encoder(16),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    call = {**CALL, "negative_prompt": "bad", "guidance_scale": 3.0, "max_sequence_length": 64}
    call |= {"height": 32, "width": 48}
    prompts = ["a cat", "a white dog runs away over the green hills"]
    batch = {"prompt": prompts, "negative_prompt": ["bad", "worse"]}
    odd = {"height": 26, "width": 34}
    return Tiny(pipe, call, odd, batch=batch, refused={"radial": "one frame"})


TINY = {"z-image": text_to_image}
