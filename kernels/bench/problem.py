"""What is timed: sizes of published models, and masks of several kinds."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vdit_sparse.kernels.block_mask import BlockMask

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PATTERNS = ("local", "random", "ragged")
SPREAD = 16  # longest row of a ragged mask over its shortest


@dataclass(frozen=True)
class Shape:
    """Self-attention of a published model: heads of `dim` channels over a grid of `frames`,
    `height` and `width` tokens, then `text` tokens."""

    heads: int
    dim: int
    frames: int
    height: int
    width: int
    text: int = 0

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width + self.text


# The pipelines' default sizes; Wan's heads are the 14B model's.
SHAPES = {
    "wan-480p": Shape(40, 128, 21, 30, 52),
    "wan-720p": Shape(40, 128, 21, 45, 80),
    "hunyuan-720p": Shape(24, 128, 33, 45, 80, text=256),
    "cogvideox1.5": Shape(48, 64, 11, 48, 85, text=226),
    "flux-1024": Shape(24, 128, 1, 64, 64, text=512),
    "flux-4096": Shape(24, 128, 1, 256, 256, text=512),
}


@dataclass(frozen=True)
class Problem:
    """One attention call of `heads` heads over `tokens` tokens; frames: of the local pattern."""

    heads: int
    tokens: int
    dim: int
    block: int
    dtype: torch.dtype
    device: torch.device
    frames: int = 16

    def tensors(self) -> list[Tensor]:
        """q, k and v as a transformer gives them, `[1, H, S, D]` views of `[1, S, H, D]`."""
        shape = (1, self.tokens, self.heads, self.dim)
        make = partial(torch.randn, shape, dtype=self.dtype, device=self.device)
        return [make().transpose(1, 2) for _ in range(3)]

    def mask(self, pattern: str, density: float) -> BlockMask:
        """`density` of the key blocks, a list per head: near ones in space and time ("local"), any
        ("random", the worst case for caches), or any with rows of very different lengths
        ("ragged": 16 to 1, log-uniform)."""
        if pattern not in PATTERNS:
            raise ValueError(f"pattern must be one of {PATTERNS}, got {pattern!r}.")
        blocks = -(-self.tokens // self.block)
        scores = torch.rand(self.heads, blocks, blocks, device=self.device)
        if pattern == "local":
            at = torch.arange(blocks, device=self.device)
            frame, place = at * self.frames // blocks, at % -(-blocks // self.frames)
            distance = (place[:, None] - place).abs() + 2.0 * (frame[:, None] - frame).abs()
            scores = scores - distance
        if pattern == "ragged":
            lengths = SPREAD ** torch.rand(self.heads, blocks, 1, device=self.device)
            lengths *= density * blocks / lengths.mean()
        else:
            lengths = torch.tensor(density * blocks, device=self.device)
        rank = scores.argsort(-1, descending=True).argsort(-1)
        keep = rank < lengths.round().clamp(min=1, max=blocks)
        return BlockMask.from_keep(keep, self.block)
