"""Chroma: FLUX's layers, and a mask of padded text that is added to the scores."""

import torch
from diffusers import ChromaTransformer2DModel

from tests.tiny_models.parts import CALL, Tiny, flow, image_vae, t5_encoder, t5_tokenizer
from vdit_sparse.pipelines.chroma import ChromaPipeline


def text_to_image() -> Tiny:
    """16 x 24 tokens and 40 of text, most of it padding; guidance in two calls a step."""
    torch.manual_seed(0)
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    scale = {"shift_factor": 0.06, "scaling_factor": 1.5}
    pipe = ChromaPipeline(
        scheduler=flow(),
        vae=image_vae(use_quant_conv=False, use_post_quant_conv=False, **scale),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        transformer=transformer.eval(),
    )
    call = {**CALL, "negative_prompt": "bad", "guidance_scale": 3.5, "max_sequence_length": 40}
    call |= {"height": 32, "width": 48}
    return Tiny(pipe, call, {"height": 26, "width": 34}, refused={"radial": "one frame"})


TINY = {"chroma": text_to_image}
