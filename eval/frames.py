"""What a metric is given: two videos of one shape, as 8-bit frames."""

import torch
from torch import Tensor

PEAK = 255.0


def levels(video: Tensor, reference: Tensor) -> Tensor:
    """The 8-bit levels of `video`, uint8 `[T, C, H, W]`; `reference` is there to be compared with.

    Both are uint8, or float in [0, 1] (rounded, as a video file would have it). Raises ValueError
    if they differ in shape or are no videos.
    """
    if video.ndim != 4 or video.shape != reference.shape or video.numel() == 0:
        raise ValueError(
            "Expected a video and a reference of one shape [T, C, H, W], not empty, got "
            f"{tuple(video.shape)} and {tuple(reference.shape)}."
        )
    if video.dtype == torch.uint8:
        return video
    if not video.is_floating_point() or not 0 <= video.min() <= video.max() <= 1:
        raise ValueError(
            f"Expected uint8 or float frames in [0, 1], got {video.dtype} from {video.min():.4g} "
            f"to {video.max():.4g}."
        )
    return (video.double() * PEAK).round().to(torch.uint8)
