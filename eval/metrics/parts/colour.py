"""Luma of 8-bit frames."""

import torch
from torch import Tensor

# ITU-R BT.601, as OpenCV's and Pillow's grey and VBench's readers have it.
WEIGHTS = (0.299, 0.587, 0.114)


def luma(frames: Tensor) -> Tensor:
    """Luma of uint8 frames `[T, 1 or 3, H, W]`, RGB: float64 `[T, H, W]`, 0 to 255, not rounded.

    Raises ValueError for another number of channels.
    """
    if frames.shape[1] == 1:
        return frames[:, 0].double()
    weights = frames.new_tensor(WEIGHTS, dtype=torch.float64)
    # Frame by frame: in float64 the three channels of a whole clip are gigabytes.
    return torch.stack([torch.einsum("c,chw->hw", weights, each.double()) for each in rgb(frames)])


def rgb(frames: Tensor) -> Tensor:
    """The frames, if they have three channels; raises ValueError if not."""
    if frames.shape[1] != 3:
        raise ValueError(f"Expected RGB frames [T, 3, H, W], got {tuple(frames.shape)}.")
    return frames
