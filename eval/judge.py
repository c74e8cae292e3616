"""The judge of the bundled model's clips: what a video shows, as a small network sees it.

It knows the world of `pipelines/mini/training` only; what it says of other videos means nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vdit_sparse.pipelines.mini.training.judge import (
    SHIPPED,
    JudgeNetwork,
    load_network,
    resample,
)

FOLDER = SHIPPED


@dataclass(frozen=True, eq=False)
class Judge:
    """A trained judge; `load_judge` makes one.

    network: in float32, on the device where videos are judged.
    classes: head -> the names of its classes, in the order of a distribution.
    held_out: what was measured when it was trained: `clips`, and the accuracy per row of a report
        for `renders`, for `static` and `moving`, which are the `renders` by their camera, and for
        `autoencoded` ones; empty if it was not measured.
    """

    network: JudgeNetwork
    classes: Mapping[str, tuple[str, ...]]
    held_out: Mapping

    @torch.no_grad()
    def __call__(self, video: Tensor) -> dict[str, Tensor]:
        """Head -> probabilities of its classes, float32 `[classes]` on the CPU.

        video: uint8 `[T, 3, H, W]`, or float in [0, 1], of any size: eight evenly spaced frames
            are taken and scaled to 64 x 112 pixels. Raises ValueError for anything else.
        """
        device = self.network.queries.device
        clip = resample(unit_range(video.to(device)).transpose(0, 1)[None] * 2 - 1)
        logits = self.network(clip)
        return {head: each[0].softmax(0).cpu() for head, each in logits.items()}

    def answers(self, video: Tensor) -> dict[str, str]:
        """Head -> the class that is most probable."""
        found = self(video)
        return {head: self.classes[head][int(each.argmax())] for head, each in found.items()}

    def accuracy(self, row: str, kind: str = "renders") -> float | None:
        """On held-out clips of a kind; None where it was not measured."""
        return self.held_out.get(kind, {}).get(row)


def load_judge(
    folder: str | Path | None = None, *, device: str | torch.device | None = None
) -> Judge:
    """The judge in `folder`, by default the one shipped with the bundled model.

    device: default the GPU if there is one, else the CPU. Raises FileNotFoundError where there is
    none, saying how to train one.
    """
    network, config = load_network(Path(folder or FOLDER))
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Judge(network.to(device), network.names, config.get("held_out", {}))


def unit_range(video: Tensor) -> Tensor:
    """A video `[T, 3, H, W]`, uint8 or float in [0, 1], as float32 in [0, 1].

    Raises ValueError for another shape, dtype or range.
    """
    if video.ndim != 4 or video.shape[1] != 3 or video.numel() == 0:
        raise ValueError(
            f"Expected a video [T, 3, H, W], not empty, got {tuple(video.shape)}: judge one video "
            "at a time, frames first."
        )
    if video.dtype == torch.uint8:
        return video.float() / 255
    if not video.is_floating_point() or not 0 <= video.min() <= video.max() <= 1:
        raise ValueError(
            f"Expected uint8 or float frames in [0, 1], got {video.dtype} from {video.min():.4g} "
            f"to {video.max():.4g}: scale them."
        )
    return video.float()
