"""A request's model, loaded as the request says, and the arguments of its call."""

import inspect
import re
from collections.abc import Sequence

import torch
from PIL import Image, ImageOps

from vdit_sparse.app.checks import (
    check_after_loading,
    check_before_loading,
    check_device,
    read_image,
)
from vdit_sparse.app.options import DTYPES, InputError
from vdit_sparse.app.processes import spread
from vdit_sparse.app.request import Request
from vdit_sparse.app.terminal import Progress
from vdit_sparse.eval.denoise import call_parameters
from vdit_sparse.pipelines.families import DENOISERS


def load(request: Request):
    """The request's pipeline on its device, with LoRAs, dense backend, offloading and compilation,
    and under torchrun spread over the processes.

    Raises InputError for a model, LoRA or backend that cannot be had, or does not fit the request.
    """
    from vdit_sparse.pipelines.load import default_dtype, load_pipeline
    from vdit_sparse.pipelines.memory import place

    device = check_device(request.device)
    dtype = DTYPES[request.dtype] if request.dtype else default_dtype(device)
    home = device if request.offload == "none" else torch.device("cpu")
    parts = {"base": request.base, "image_to_video": request.image is not None}
    try:
        pipe = load_pipeline(request.model, dtype=dtype, device=home, **parts)
    except Exception as error:
        if not _is_of_the_source(error):
            raise
        raise InputError(_load_error(request.model, error)) from error
    pipe.set_progress_bar_config(disable=True)
    check_after_loading(pipe, request)
    _load_loras(pipe, request.loras)
    models = [model for name in DENOISERS if (model := getattr(pipe, name, None)) is not None]
    for model in models:
        if request.dense_backend is not None:
            _set_dense_backend(model, request.dense_backend)
    try:
        place(pipe, request.offload, device)
    except MemoryError as error:
        raise InputError(str(error).replace("offload=", "--offload ")) from error
    spread(pipe, request)
    for model in models:
        if request.compile:
            model.compile_repeated_blocks(fullgraph=True)
    return pipe


def opened(request: Request, progress: Progress) -> tuple[object, dict]:
    """The request's pipeline, and the arguments of its call but for the text: for commands that run
    it in ways of their own. Raises InputError for what the caller can put right."""
    check_before_loading(request)
    image = read_image(request.image)
    progress("loading the model", 0, None)
    pipe = load(request)
    settings = settings_of(pipe, request)
    settings.pop("fps", None)
    if image is not None:
        settings["image"] = _fitted(image, settings)
    progress("loading the model", 1, 1)
    return pipe, settings


def settings_of(pipe, request: Request) -> dict:
    """The checkpoint's default arguments, and `fps`, with the request's in their place."""
    from vdit_sparse.pipelines.load import defaults

    height, width = request.size or (None, None)
    asked = {
        "height": height,
        "width": width,
        "num_frames": request.num_frames,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance_scale,
    }
    return {**defaults(pipe), **{name: value for name, value in asked.items() if value is not None}}


def call_inputs(pipe, request: Request, settings: dict, image: Image.Image | None) -> dict:
    """Arguments of the pipeline's call that all runs share, and the seed. The text is encoded here,
    once, where the pipeline takes it encoded."""
    inputs = {name: value for name, value in settings.items() if name != "fps"}
    inputs["seed"] = request.seed
    if image is not None:
        inputs["image"] = _fitted(image, settings)
    text = {"prompt": request.prompt, "negative_prompt": request.negative_prompt}
    if request.negative_prompt is None:
        # Not every call has one, and where it has its default may be a text.
        text.pop("negative_prompt")
    if not takes_encoded_text(pipe):
        return {**inputs, **text}
    guided = settings["guidance_scale"] > 1
    length = settings["max_sequence_length"]
    with torch.no_grad():
        positive, negative = pipe.encode_prompt(
            **text, do_classifier_free_guidance=guided, max_sequence_length=length
        )
    return {**inputs, "prompt_embeds": positive, "negative_prompt_embeds": negative}


def _fitted(image: Image.Image, settings: dict) -> Image.Image:
    return ImageOps.fit(image, (settings["width"], settings["height"]))


def takes_encoded_text(pipe) -> bool:
    """Whether the call takes the two tensors that `encode_prompt` gives, and no masks or more."""
    names = {name for name in call_parameters(pipe) if "prompt_" in name}
    guided = "do_classifier_free_guidance" in inspect.signature(pipe.encode_prompt).parameters
    return names == {"prompt_embeds", "negative_prompt_embeds"} and guided


def _is_of_the_source(error: Exception) -> bool:
    """Whether an error comes from the files, the network or the machine, and not from a mistake of
    ours."""
    network = type(error).__module__.split(".")[0] in ("httpx", "huggingface_hub")
    return network or isinstance(error, OSError | ValueError | MemoryError | ImportError)


def _load_error(model: str | None, error: Exception) -> str:
    """One line about a model that could not be loaded. `load_pipeline` says what to do by itself;
    other errors are told with the model's name."""
    said = " ".join(str(error).split())[:500] or type(error).__name__
    said = re.sub(r'base="([^"]*)"', r"--base \1", said).replace("base=", "--base")
    name = model or "the bundled model"
    return said if name in said or isinstance(error, MemoryError) else f"Cannot load {name}: {said}"


def _load_loras(pipe, loras: Sequence[tuple[str, float]]) -> None:
    names = []
    for number, (source, _) in enumerate(loras):
        names.append(f"lora_{number}")
        try:
            pipe.load_lora_weights(source, adapter_name=names[-1])
        except Exception as error:
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise InputError(
                f"Cannot load the LoRA {source}: check that it is of this model, its name and your "
                f"network ({said})"
            ) from error
    if names:
        pipe.set_adapters(names, [weight for _, weight in loras])


def _set_dense_backend(model, backend: str) -> None:
    try:
        model.set_attention_backend(backend)
    except (ImportError, RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())[:300]
        raise InputError(
            f"--dense-backend {backend} does not run here: {said} See `vdit-sparse doctor`."
        ) from error
