"""`load_pipeline`: hub id, folder, file or the bundled model as a pipeline that takes a method."""

import inspect
import json
from collections.abc import Mapping
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from vdit_sparse.pipelines.attach import SparsePipelineMixin
from vdit_sparse.pipelines.families import REFUSED
from vdit_sparse.pipelines.few_step import load_few_step
from vdit_sparse.pipelines.memory import check_ram, place
from vdit_sparse.pipelines.single_file import base_of, transformer_of
from vdit_sparse.pipelines.sources import INDEX, hub_errors, read_json, source_of

MINI = Path(__file__).parent / "mini"
# The bundled model in few steps; a folder of this name is "./mini-fast".
FEW_STEP = "mini-fast"

# Autoencoders that their authors run in fp32, and whose pipelines hand them fp32; other pipelines
# hand theirs what the transformer has, and fail where it is another dtype.
FP32_VAES = ("AutoencoderKLWan",)
# Autoencoders that diffusers decodes in tiles only.
TILED_VAES = ("AutoencoderKLAllegro",)

# Class in a checkpoint's model_index.json -> ours, imported on demand.
PIPELINES = {
    "AllegroPipeline": "vdit_sparse.pipelines.allegro",
    "ChromaImg2ImgPipeline": "vdit_sparse.pipelines.chroma",
    "ChromaInpaintPipeline": "vdit_sparse.pipelines.chroma",
    "ChromaPipeline": "vdit_sparse.pipelines.chroma",
    "CogVideoXImageToVideoPipeline": "vdit_sparse.pipelines.cogvideox",
    "CogVideoXPipeline": "vdit_sparse.pipelines.cogvideox",
    "CogVideoXVideoToVideoPipeline": "vdit_sparse.pipelines.cogvideox",
    "Cosmos2TextToImagePipeline": "vdit_sparse.pipelines.cosmos",
    "Cosmos2VideoToWorldPipeline": "vdit_sparse.pipelines.cosmos",
    "Cosmos2_5_PredictBasePipeline": "vdit_sparse.pipelines.cosmos",
    "Cosmos2_5_TransferPipeline": "vdit_sparse.pipelines.cosmos",
    "CosmosTextToWorldPipeline": "vdit_sparse.pipelines.cosmos",
    "CosmosVideoToWorldPipeline": "vdit_sparse.pipelines.cosmos",
    "Flux2KleinInpaintPipeline": "vdit_sparse.pipelines.flux2",
    "Flux2KleinPipeline": "vdit_sparse.pipelines.flux2",
    "Flux2Pipeline": "vdit_sparse.pipelines.flux2",
    "FluxFillPipeline": "vdit_sparse.pipelines.flux",
    "FluxKontextPipeline": "vdit_sparse.pipelines.flux",
    "FluxPipeline": "vdit_sparse.pipelines.flux",
    "HiDreamImagePipeline": "vdit_sparse.pipelines.hidream",
    "HunyuanDiTControlNetPipeline": "vdit_sparse.pipelines.hunyuan_dit",
    "HunyuanDiTPipeline": "vdit_sparse.pipelines.hunyuan_dit",
    "HunyuanVideo15ImageToVideoPipeline": "vdit_sparse.pipelines.hunyuan_video15",
    "HunyuanVideo15Pipeline": "vdit_sparse.pipelines.hunyuan_video15",
    "HunyuanVideoImageToVideoPipeline": "vdit_sparse.pipelines.hunyuan_video",
    "HunyuanVideoPipeline": "vdit_sparse.pipelines.hunyuan_video",
    "Kandinsky5I2IPipeline": "vdit_sparse.pipelines.kandinsky5",
    "Kandinsky5I2VPipeline": "vdit_sparse.pipelines.kandinsky5",
    "Kandinsky5T2IPipeline": "vdit_sparse.pipelines.kandinsky5",
    "Kandinsky5T2VPipeline": "vdit_sparse.pipelines.kandinsky5",
    "LTX2ConditionPipeline": "vdit_sparse.pipelines.ltx2",
    "LTX2DFRPipeline": "vdit_sparse.pipelines.ltx2",
    "LTX2DFRTemporalRefinePipeline": "vdit_sparse.pipelines.ltx2",
    "LTX2HDRPipeline": "vdit_sparse.pipelines.ltx2",
    "LTX2ImageToVideoPipeline": "vdit_sparse.pipelines.ltx2",
    "LTX2InContextPipeline": "vdit_sparse.pipelines.ltx2",
    "LTX2Pipeline": "vdit_sparse.pipelines.ltx2",
    "LTXConditionPipeline": "vdit_sparse.pipelines.ltx_video",
    "LTXI2VLongMultiPromptPipeline": "vdit_sparse.pipelines.ltx_video",
    "LTXImageToVideoPipeline": "vdit_sparse.pipelines.ltx_video",
    "LTXPipeline": "vdit_sparse.pipelines.ltx_video",
    "MochiPipeline": "vdit_sparse.pipelines.mochi",
    "PixArtAlphaPipeline": "vdit_sparse.pipelines.pixart",
    "PixArtSigmaPipeline": "vdit_sparse.pipelines.pixart",
    "QwenImageControlNetInpaintPipeline": "vdit_sparse.pipelines.qwen_image",
    "QwenImageControlNetPipeline": "vdit_sparse.pipelines.qwen_image",
    "QwenImageEditInpaintPipeline": "vdit_sparse.pipelines.qwen_image",
    "QwenImageEditPipeline": "vdit_sparse.pipelines.qwen_image",
    "QwenImageEditPlusPipeline": "vdit_sparse.pipelines.qwen_image",
    "QwenImageImg2ImgPipeline": "vdit_sparse.pipelines.qwen_image",
    "QwenImageInpaintPipeline": "vdit_sparse.pipelines.qwen_image",
    "QwenImageLayeredPipeline": "vdit_sparse.pipelines.qwen_image",
    "QwenImagePipeline": "vdit_sparse.pipelines.qwen_image",
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": "vdit_sparse.pipelines.skyreels_v2",
    "SkyReelsV2DiffusionForcingPipeline": "vdit_sparse.pipelines.skyreels_v2",
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": "vdit_sparse.pipelines.skyreels_v2",
    "SkyReelsV2ImageToVideoPipeline": "vdit_sparse.pipelines.skyreels_v2",
    "SkyReelsV2Pipeline": "vdit_sparse.pipelines.skyreels_v2",
    "StableDiffusion3ControlNetInpaintingPipeline": "vdit_sparse.pipelines.stable_diffusion_3",
    "StableDiffusion3ControlNetPipeline": "vdit_sparse.pipelines.stable_diffusion_3",
    "StableDiffusion3Img2ImgPipeline": "vdit_sparse.pipelines.stable_diffusion_3",
    "StableDiffusion3InpaintPipeline": "vdit_sparse.pipelines.stable_diffusion_3",
    "StableDiffusion3Pipeline": "vdit_sparse.pipelines.stable_diffusion_3",
    "WanImageToVideoPipeline": "vdit_sparse.pipelines.wan",
    "WanPipeline": "vdit_sparse.pipelines.wan",
    "WanVACEPipeline": "vdit_sparse.pipelines.wan_vace",
    "ZImageControlNetInpaintPipeline": "vdit_sparse.pipelines.z_image",
    "ZImageControlNetPipeline": "vdit_sparse.pipelines.z_image",
    "ZImageImg2ImgPipeline": "vdit_sparse.pipelines.z_image",
    "ZImageInpaintPipeline": "vdit_sparse.pipelines.z_image",
    "ZImagePipeline": "vdit_sparse.pipelines.z_image",
}
# Checkpoints of the first class that expand timesteps (Wan 2.2 TI2V-5B) also take an image.
FROM_IMAGE = {"WanPipeline": "WanImageToVideoPipeline"}


def load_pipeline(
    model: str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    image_to_video: bool = False,
    offload: str = "none",
    base: str | Path | None = None,
) -> DiffusionPipeline:
    """A diffusers pipeline whose `set_attn_processor` takes a sparse attention method.

    model: None for the bundled text-to-video model, "mini-fast" for the same in few steps without
        guidance, a folder, a hub id, a short name of docs/models.md such as "wan2.1-t2v-14b", or a
        file with a transformer's weights: safetensors, or GGUF, which stays quantised.
    dtype: of all weights; default bf16 on a GPU, and on a CPU that multiplies it natively, else
        fp32. The VAE of Wan and SkyReels stays in fp32, as their authors run it.
    device: default the GPU if there is one, else the CPU.
    image_to_video: load a text-to-video checkpoint that also takes images (Wan 2.2 TI2V-5B) as its
        image-to-video pipeline.
    offload: what waits in RAM: "none", "model", "sequential" or "group" (`memory.place`).
    base: the folder or hub id that a single file's other parts come from (of two experts, the
        second one too); default what diffusers recognises in the file.

    Raises, each in a line that says what to do: FileNotFoundError for a model that is not there or
    not in diffusers' format, PermissionError for a gated one, ConnectionError without a network,
    MemoryError if the weights do not fit into the RAM or on the GPU (naming the `offload` that
    does), ImportError without the package gguf, ValueError for pipelines that are not supported.
    """
    bundled, few_step = model in (None, FEW_STEP), model == FEW_STEP
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or default_dtype(device)
    source, parts = _parts(MINI if bundled else source_of(model), base, dtype)
    cls = _pipeline_class(source, image_to_video)
    dtypes = dtype if bundled else _dtypes(source, dtype)
    pipe = _from_pretrained(cls, source, dtype=dtypes, **parts)
    pipe.generation = {**cls.generation, **_generation(source)}
    if few_step:
        pipe.generation |= load_few_step(pipe, MINI)
    place(pipe, offload, device)
    return pipe


def _parts(
    source: str | Path, base: str | Path | None, dtype: torch.dtype
) -> tuple[str | Path, dict[str, torch.nn.Module]]:
    """The folder or hub id of a pipeline, and those of its parts that a single file brings."""
    if not (isinstance(source, Path) and source.is_file()):
        return source, {}
    home = base_of(source) if base is None else source_of(base)
    return home, {"transformer": transformer_of(source, home, dtype)}


def _dtypes(source: str | Path, dtype: torch.dtype) -> torch.dtype | dict[str, torch.dtype]:
    _, vae = read_json(source, INDEX).get("vae") or (None, None)
    return {"default": dtype, "vae": torch.float32} if vae in FP32_VAES else dtype


def _from_pretrained(
    cls: type[DiffusionPipeline], source: str | Path, **options
) -> DiffusionPipeline:
    if isinstance(source, Path) and not options.get("transformer"):
        check_ram(source)
    with hub_errors(source) if not isinstance(source, Path) else nullcontext():
        pipe = cls.from_pretrained(str(source), **options)
    if type(getattr(pipe, "vae", None)).__name__ in TILED_VAES:
        pipe.vae.enable_tiling()
    return pipe


def stock_parameters(pipeline: str) -> Mapping[str, inspect.Parameter]:
    """The parameters of the call of diffusers' own pipeline, by the name of its class in
    `PIPELINES`; see `SparsePipelineMixin.stock_signature`."""
    kind = getattr(import_module(PIPELINES[pipeline]), pipeline)
    return inspect.signature(super(SparsePipelineMixin, kind).__call__).parameters


def defaults(pipe: DiffusionPipeline) -> dict:
    """Arguments of the pipeline's call that are used where none are given, and the video's `fps`:
    the checkpoint's own (its generation.json), else those of the call's signature."""
    names = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
    parameters = pipe.stock_signature.parameters
    there = [name for name in (*names, "max_sequence_length") if name in parameters]
    stock = {name: parameters[name].default for name in there}
    return {**stock, "fps": 16, **pipe.generation}


def default_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device multiplies it in hardware, else fp32."""
    if device.type != "cpu" or torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


def _pipeline_class(source: str | Path, image_to_video: bool) -> type[DiffusionPipeline]:
    config = read_json(source, INDEX)
    name = config["_class_name"]
    if image_to_video and name in FROM_IMAGE:
        if not config.get("expand_timesteps"):
            raise ValueError(f"{source} makes videos from text only: leave the image out.")
        name = FROM_IMAGE[name]
    if name not in PIPELINES:
        _, kind = config.get("transformer") or (None, None)
        if kind in REFUSED:
            raise ValueError(f"{source} has no sparse attention: {REFUSED[kind]}.")
        raise ValueError(
            f"{source} is a {name}, which is not supported; supported: {', '.join(PIPELINES)}."
        )
    return getattr(import_module(PIPELINES[name]), name)


def _generation(source: str | Path) -> dict:
    file = Path(source) / "generation.json"
    return json.loads(file.read_text()) if file.is_file() else {}
