"""LTX-2 and 2.3: video and sound in two streams, conditions as tokens after the video."""

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    LTX2VideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2ReferenceCondition, LTX2TextConnectors, LTX2VideoCondition
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from PIL import Image

from tests.tiny_models.parts import (
    BATCH,
    CALL,
    Tiny,
    encoding_once,
    flow,
    gemma3_encoder,
    gemma_tokenizer,
)
from vdit_sparse.pipelines.ltx2 import (
    LTX2ConditionPipeline,
    LTX2ImageToVideoPipeline,
    LTX2InContextPipeline,
    LTX2Pipeline,
)

# 4 x 8 x 16 tokens: the tiny VAE makes 8 x 8 x 8 pixels one.
SIZE = {"height": 64, "width": 128, "num_frames": 25}
ODD = {"height": 96, "width": 160, "num_frames": 17}
PLAIN = {"stg_scale": 0.0, "audio_stg_scale": 0.0, "spatio_temporal_guidance_blocks": None}
PLAIN |= {"modality_scale": 1.0, "audio_modality_scale": 1.0, "max_sequence_length": 16}
WORDS = {**PLAIN, "negative_prompt": "", "guidance_scale": 3.0}
TWO = {**BATCH, "negative_prompt": ["", "bad"]}
RED = Image.new("RGB", (128, 64), "red")
# Version 2.3: gates on heads, modulated cross-attention, perturbed layers.
NEW = {
    "gated_attn": True,
    "audio_gated_attn": True,
    "cross_attn_mod": True,
    "audio_cross_attn_mod": True,
    "perturbed_attn": True,
}


def text_to_video() -> Tiny:
    call = {**CALL, **SIZE, **WORDS, "use_cross_timestep": False}
    return Tiny(LTX2Pipeline(**parts()), call, ODD, batch=TWO)


def version_2_3() -> Tiny:
    """With guidance by isolated modalities: a second call a step."""
    call = {**CALL, **SIZE, **WORDS, "modality_scale": 3.0, "audio_modality_scale": 3.0}
    return Tiny(LTX2Pipeline(**parts(rope_type="interleaved", **NEW)), call, ODD, batch=TWO)


def image_to_video() -> Tiny:
    call = {**CALL, **SIZE, **WORDS, "image": RED, "image_crf": 0}
    return Tiny(
        LTX2ImageToVideoPipeline(**parts()),
        call,
        ODD,
        batch={**TWO, "image": torch.zeros(2, 3, 64, 128)},
    )


def conditions() -> Tiny:
    pipe = LTX2ConditionPipeline(**parts())
    images = [LTX2VideoCondition(frames=RED, index=index, crf=0) for index in (0, 2)]
    return Tiny(pipe, {**CALL, **SIZE, **WORDS, "conditions": images}, ODD, batch=TWO)


def references() -> Tiny:
    pipe = LTX2InContextPipeline(**parts(**NEW))
    reference = LTX2ReferenceCondition(frames=[RED] * 9)
    call = {**CALL, **SIZE, **WORDS, "reference_conditions": reference}
    return Tiny(pipe, {**call, "reference_downscale_factor": 2}, ODD, batch=TWO)


def parts(**config) -> dict:
    torch.manual_seed(0)
    config = {"rope_type": "split", **config}
    transformer = LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        vae_scale_factors=(8, 8, 8),
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
        **config,
    )
    return {
        "scheduler": flow(),
        "vae": _video_vae(),
        "audio_vae": _audio_vae(),
        "text_encoder": gemma3_encoder(),
        "tokenizer": gemma_tokenizer(),
        "connectors": _connectors(config["rope_type"]),
        "transformer": transformer.eval(),
        "vocoder": _vocoder(),
    }


def _connectors(rope_type: str) -> LTX2TextConnectors:
    torch.manual_seed(0)
    streams = {
        f"{stream}_connector_{name}": value
        for stream in ("video", "audio")
        for name, value in {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 1,
            "num_learnable_registers": None,
        }.items()
    }
    return LTX2TextConnectors(
        caption_channels=16,
        text_proj_in_factor=3,  # two layers of the encoder and its embeddings
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
        rope_type=rope_type,
        **streams,
    ).eval()


def _video_vae() -> AutoencoderKLLTX2Video:
    torch.manual_seed(0)
    vae = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, True),
        decoder_spatio_temporal_scaling=(True, True, True),
        decoder_inject_noise=(False,) * 4,
        downsample_type=("spatiotemporal",) * 3,
        upsample_residual=(False,) * 3,
        upsample_factor=(1,) * 3,
        timestep_conditioning=False,
        patch_size=1,
    )
    return encoding_once(vae.eval())


def _audio_vae() -> AutoencoderKLLTX2Audio:
    torch.manual_seed(0)
    return AutoencoderKLLTX2Audio(
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        resolution=32,
        latent_channels=2,
        mel_bins=8,
    ).eval()


def _vocoder() -> LTX2Vocoder:
    torch.manual_seed(0)
    return LTX2Vocoder(
        in_channels=16,
        hidden_channels=32,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    ).eval()


TINY = {
    "ltx2": text_to_video,
    "ltx2.3": version_2_3,
    "ltx2-i2v": image_to_video,
    "ltx2-conditions": conditions,
    "ltx2-references": references,
}
