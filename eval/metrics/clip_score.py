"""CLIPScore of a video and its prompt, where CLIP's weights are on this machine."""

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from vdit_sparse.eval.frames import levels
from vdit_sparse.eval.metrics.parts.batches import exact
from vdit_sparse.eval.metrics.parts.colour import rgb
from vdit_sparse.eval.metrics.parts.sources import module_missing

MODEL = "openai/clip-vit-base-patch32"
_NEEDED = ("config.json", "preprocessor_config.json", "vocab.json", "merges.txt")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@exact()
def clip_score_per_frame(video: Tensor, prompt: str) -> Tensor:
    """100 max(cos, 0) of CLIP's features of each frame and the prompt: float64 `[T]`.

    Hessel et al., arXiv 2104.08718, with their network, CLIP ViT-B/32; without their factor 2.5,
    as torchmetrics has it (whose own function fails with transformers 5). A prompt beyond 77 tokens
    is cut. The weights are taken from Hugging Face's cache and never downloaded.

    video: RGB `[T, 3, H, W]`, uint8, or float in [0, 1]; ValueError if it is no such video.
    """
    frames = rgb(levels(video, video))
    model, processor = _network(_folder(), video.device)
    inputs = processor(
        text=[prompt], images=list(frames.cpu()), return_tensors="pt", truncation=True
    ).to(video.device)
    # The whole forward: what the two halves return changed from transformers 4 to 5.
    found = model(**inputs)
    cosines = F.normalize(found.image_embeds) @ F.normalize(found.text_embeds).T
    return 100 * cosines[:, 0].clamp(min=0).double()


def unavailable() -> str | None:
    if reason := module_missing("torchmetrics", "torchmetrics"):
        return reason
    if _folder() is not None:
        return None
    return f"its weights are not in Hugging Face's cache: run `hf download {MODEL}`."


def _folder() -> Path | None:
    """Where the cache has the model; None if any file of it is lacking."""
    found = {name: try_to_load_from_cache(MODEL, name) for name in (*_NEEDED, *_WEIGHTS)}
    there = {name for name, file in found.items() if isinstance(file, str)}
    if there.issuperset(_NEEDED) and there.intersection(_WEIGHTS):
        return Path(found["config.json"]).parent
    return None


@cache
def _network(folder: Path, device: torch.device):
    """The model and its processor, loaded by torchmetrics: transformers is not for this room."""
    from torchmetrics.multimodal import CLIPScore

    # A path is not asked from the hub; torchmetrics knows CLIP by "openai" in it.
    loaded = CLIPScore(model_name_or_path=str(folder))
    return loaded.model.to(device).eval(), loaded.processor
