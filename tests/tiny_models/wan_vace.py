"""Wan VACE: control blocks before the others, reference images as frames before the video's."""

from diffusers import WanVACETransformer3DModel
from PIL import Image

from tests.tiny_models.parts import (
    CALL,
    Tiny,
    encoding_once,
    flow,
    t5_tokenizer,
    umt5_encoder,
    wan_vae,
)
from tests.tiny_models.wan import wan_transformer
from vdit_sparse.pipelines.wan_vace import WanVACEPipeline


def with_a_reference() -> Tiny:
    config = {"vace_layers": [0, 1], "kind": WanVACETransformer3DModel}
    pipe = WanVACEPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=umt5_encoder(),
        vae=encoding_once(wan_vae()),
        scheduler=flow(shift=7.0),
        transformer=wan_transformer(2, 16, **config),
    )
    # 4 x 8 x 16 tokens, of which the first frame is the reference; it takes one prompt only.
    call = {**CALL, "height": 128, "width": 256, "num_frames": 9}
    call |= {"negative_prompt": "bad", "guidance_scale": 5.0, "max_sequence_length": 16}
    call["reference_images"] = [Image.new("RGB", (64, 64), "red")]
    return Tiny(pipe, call, odd={"height": 80, "width": 112, "num_frames": 9}, batch={})


TINY = {"wan-vace": with_a_reference}
