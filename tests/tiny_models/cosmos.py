"""Cosmos: self-attention, text apart; given frames in channels and timesteps; also images."""

import torch
from diffusers import (
    AutoencoderKLCosmos,
    ConfigMixin,
    CosmosTransformer3DModel,
    EDMEulerScheduler,
    ModelMixin,
    UniPCMultistepScheduler,
)
from PIL import Image

from tests.tiny_models.parts import (
    CALL,
    Tiny,
    encoding_once,
    flow,
    qwen_tokenizer,
    qwen_vl_encoder,
    t5_encoder,
    t5_tokenizer,
    wan_vae,
)
from vdit_sparse.pipelines.cosmos import (
    Cosmos2_5_PredictBasePipeline,
    Cosmos2TextToImagePipeline,
    Cosmos2VideoToWorldPipeline,
    CosmosTextToWorldPipeline,
)

GUIDED = {**CALL, "negative_prompt": "bad", "guidance_scale": 3.0, "max_sequence_length": 16}
# 4 x 8 x 16 tokens behind a VAE of 4 x 8 x 8 and patches of 2.
SIZE = {"height": 128, "width": 256, "num_frames": 13}
ODD = {"height": 80, "width": 112, "num_frames": 9}
# From sigma 80, where latents have that size, to 0.002, where what the model says has none.
KARRAS = {"num_inference_steps": 3}
LOUD = {"tolerance": 2e-4}


class NoSafetyChecker(ModelMixin, ConfigMixin):
    """In place of a checker that is downloaded. The pipelines take no None, and loading only a
    class that is saved."""

    config_name = "config.json"

    def __init__(self):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, frames):
        return frames


def text_to_video() -> Tiny:
    torch.manual_seed(0)
    vae = AutoencoderKLCosmos(
        latent_channels=16,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=2,
        scaling_factor=1.0,
        spatial_compression_ratio=8,
        temporal_compression_ratio=4,
    )
    edm = EDMEulerScheduler(sigma_max=80, sigma_schedule="karras", final_sigmas_type="sigma_min")
    parts = _parts(16, "learnable") | {"vae": vae.eval(), "scheduler": edm}
    # Made as zeros.
    for name, embed in parts["transformer"].learnable_pos_embed.named_parameters():
        embed.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    return Tiny(CosmosTextToWorldPipeline(**parts), {**GUIDED, **KARRAS, **SIZE}, ODD, **LOUD)


def text_to_image() -> Tiny:
    pipe = Cosmos2TextToImagePipeline(**_parts(16), scheduler=flow(use_karras_sigmas=True))
    call = {**GUIDED, **KARRAS, "height": 256, "width": 384}
    odd = {"height": 208, "width": 272}
    return Tiny(pipe, call, odd, **LOUD, refused={"radial": "one frame"})


def image_to_video() -> Tiny:
    """The first frame has a timestep of its own."""
    pipe = Cosmos2VideoToWorldPipeline(**_parts(17), scheduler=flow(use_karras_sigmas=True))
    encoding_once(pipe.vae)
    call = {**GUIDED, **KARRAS, **SIZE, "image": Image.new("RGB", (256, 128), "red")}
    return Tiny(pipe, call, ODD, **LOUD)


def video_to_video() -> Tiny:
    """Predict 2.5, which takes images in channels too, and Qwen's text through a projection."""
    qwen = {"text_encoder": qwen_vl_encoder(), "tokenizer": qwen_tokenizer()}
    projection = {"use_crossattn_projection": True, "crossattn_proj_in_channels": 48}
    parts = _parts(17, encoder_hidden_states_channels=32, **projection) | qwen
    steps = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    pipe = Cosmos2_5_PredictBasePipeline(**parts, scheduler=steps)
    encoding_once(pipe.vae)
    call = {**GUIDED, **SIZE, **_embeds(1), **_given(128, 256)}
    odd = {**ODD, **_given(80, 112)}
    return Tiny(pipe, call, odd, batch={**_embeds(2), "video": None})


def _given(height: int, width: int) -> dict:
    seeded = torch.Generator().manual_seed(2)
    return {"video": torch.rand(1, 3, 5, height, width, generator=seeded) * 2 - 1}


def _embeds(rows: int) -> dict:
    seeded = torch.Generator().manual_seed(1)
    names = ("prompt_embeds", "negative_prompt_embeds")
    embeds = {name: torch.randn(rows, 16, 48, generator=seeded) for name in names}
    return {"prompt": None, "negative_prompt": None, **embeds}


def _parts(channels: int, learnable: str | None = None, **config) -> dict:
    torch.manual_seed(0)
    transformer = CosmosTransformer3DModel(
        in_channels=channels,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=32,
        adaln_lora_dim=4,
        max_size=(4, 32, 48),
        extra_pos_embed_type=learnable,
        concat_padding_mask=False,  # a mask of zeros, which wants torchvision
        **config,
    )
    return {
        "text_encoder": t5_encoder(),
        "tokenizer": t5_tokenizer(),
        "transformer": transformer.eval(),
        "vae": wan_vae(),
        "safety_checker": NoSafetyChecker(),
    }


TINY = {
    "cosmos": text_to_video,
    "cosmos2-image": text_to_image,
    "cosmos2-video": image_to_video,
    "cosmos2.5": video_to_video,
}
