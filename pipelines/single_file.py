"""One file with a transformer's weights, as published beside or instead of a diffusers folder."""

import importlib.util
from pathlib import Path

import diffusers
import torch
from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint
from safetensors import SafetensorError

from vdit_sparse.pipelines.sources import INDEX, hub_errors, read_json

# What diffusers takes a file for in which it recognises nothing.
UNKNOWN = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def base_of(file: Path) -> str:
    """Hub id of the pipeline that diffusers recognises in a file of weights. Raises ValueError if
    it recognises none, or the file is broken."""
    _check(file)
    try:
        weights = load_single_file_checkpoint(str(file))
    except (OSError, SafetensorError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"{file} is broken or no file of weights: {said}") from error
    found = fetch_diffusers_config(weights)["pretrained_model_name_or_path"]
    if found == UNKNOWN:
        raise ValueError(
            f"Nothing says what model {file} is of: name its pipeline with base=, such as "
            'base="Wan-AI/Wan2.1-T2V-14B-Diffusers".'
        )
    return found


def transformer_of(file: Path, base: str | Path, dtype: torch.dtype) -> torch.nn.Module:
    """The transformer of the pipeline `base` (folder or hub id) with the weights of a file, in the
    authors' format or diffusers'. GGUF stays quantised and computes in `dtype`.

    Raises ImportError if the package gguf is missing, and ValueError for a class that diffusers
    does not load from a file, for a broken file and for weights of another model.
    """
    _check(file)
    _, name = read_json(base, INDEX)["transformer"]
    kind = getattr(diffusers, name)
    if not hasattr(kind, "from_single_file"):
        raise ValueError(f"diffusers loads no {name} from a single file: use the folder {base}.")
    options = {"config": str(base), "subfolder": "transformer", "dtype": dtype}
    if file.suffix == ".gguf":
        options["quantization_config"] = diffusers.GGUFQuantizationConfig(compute_dtype=dtype)
    try:
        with hub_errors(str(base)):
            return kind.from_single_file(str(file), **options)
    except (PermissionError, FileNotFoundError, ConnectionError):
        raise  # of `base`
    except (OSError, RuntimeError, KeyError, ValueError, SafetensorError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{file} has not the weights of {base}'s {name}: name its own pipeline with base= "
            f"({type(error).__name__}: {said})"
        ) from error


def _check(file: Path) -> None:
    if file.suffix == ".gguf" and importlib.util.find_spec("gguf") is None:
        raise ImportError(f"{file} needs the package gguf: run `pip install gguf`.")
