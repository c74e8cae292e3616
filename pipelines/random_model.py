"""Transformers of published sizes with random weights, for measurements of speed.

Nothing is downloaded: a forward's time depends on sizes, not on weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import diffusers
import torch
from torch import Tensor

from vdit_sparse.grid import Grid


@dataclass(frozen=True)
class ModelSize:
    """The transformer of a published model.

    transformer: its class in diffusers; layers: self-attention layers of the whole model; config:
    what differs from the class's defaults, which are the largest published size; spatial, temporal:
    pixels and frames that its autoencoder makes one latent of; text: tokens of the prompt, and
    whether they are in the sequence of the self-attention (joint).
    """

    transformer: str
    layers: int
    config: Mapping = field(default_factory=dict)
    spatial: int = 8
    temporal: int = 4
    text: int = 512
    joint: bool = False

    def latent(self, height: int, width: int, frames: int) -> tuple[int, int, int]:
        """Latent frames, height and width of a video in pixels. Raises ValueError if it does not
        fit the autoencoder and patches of two by two latents."""
        pixels = 2 * self.spatial
        if height % pixels or width % pixels or (frames - 1) % self.temporal:
            raise ValueError(
                f"Height and width must be multiples of {pixels} pixels and frames 1 more than a "
                f"multiple of {self.temporal}, got {height}x{width} and {frames} frames."
            )
        return (frames - 1) // self.temporal + 1, height // self.spatial, width // self.spatial

    def grid(self, height: int, width: int, frames: int) -> Grid:
        """Tokens of a video in pixels."""
        f, h, w = self.latent(height, width, frames)
        return Grid(f, h // 2, w // 2, self.text if self.joint else 0)

    @property
    def heads(self) -> int:
        """Attention heads of a layer, of 128 channels each."""
        return self.config.get("num_attention_heads", 24 if self.joint else 40)


# The configurations of the checkpoints' own files; 14B and HunyuanVideo are diffusers' defaults.
SIZES = {
    "wan2.1-14b": ModelSize("WanTransformer3DModel", 40),
    "wan2.1-1.3b": ModelSize(
        "WanTransformer3DModel", 30, {"num_attention_heads": 12, "ffn_dim": 8960}
    ),
    "hunyuanvideo": ModelSize("HunyuanVideoTransformer3DModel", 60, text=256, joint=True),
}


def random_transformer(
    size: ModelSize, layers: int, device: torch.device, dtype: torch.dtype
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
    size: ModelSize,
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
