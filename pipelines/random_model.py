"""Transformers of published sizes with random weights, for measurements of speed.

Nothing is downloaded: a forward's time depends on sizes, not on weights.
"""

import diffusers
import torch
from torch import Tensor

from vdit_sparse.pipelines.checkpoints import Checkpoint, checkpoint_of

# What `bench model` can build and feed, by its own short names.
SIZES = {
    "wan2.1-14b": checkpoint_of("wan2.1-t2v-14b"),
    "wan2.1-1.3b": checkpoint_of("wan2.1-t2v-1.3b"),
    "hunyuanvideo": checkpoint_of("hunyuanvideo"),
}


def random_transformer(
    size: Checkpoint, layers: int, device: torch.device, dtype: torch.dtype
) -> torch.nn.Module:
    """A transformer of `layers` layers of this size, made on `device`, in the dtypes in which
    diffusers loads it: `dtype`, but fp32 for what the class keeps so. HunyuanVideo's layers are a
    third two-stream and the rest single-stream blocks, at least one of the former."""
    kind = getattr(diffusers, size.transformer)
    config = {**size.config, "num_layers": layers}
    if size.joint:
        double = max(1, layers // 3)
        config |= {"num_layers": double, "num_single_layers": layers - double}
    with torch.device(device):
        model = kind(**config).eval().requires_grad_(False)
    kept = set(kind._keep_in_fp32_modules or ())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not kept & set(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return model


def random_inputs(
    size: Checkpoint,
    video: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Arguments of the transformer's forward but for `timestep`, for one video (batch 1, no
    guidance) of `video` = height, width, frames in pixels; the text has its full length."""
    make = torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=make, device=device, dtype=dtype)

    width = size.config.get("text_embed_dim" if size.joint else "text_dim", 4096)
    inputs = {
        "hidden_states": random(16, *size.latent(*video)),
        "encoder_hidden_states": random(size.text, width),
    }
    if size.joint:
        inputs |= {
            "encoder_attention_mask": torch.ones(1, size.text, device=device, dtype=torch.int64),
            "pooled_projections": random(768),
            "guidance": torch.tensor([6000.0], device=device, dtype=dtype),
        }
    return inputs
