"""The first clips of an evaluation to look at: a sheet of all, and each as an animated picture."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from vdit_sparse.pipelines.mini.training.sample import sheet


@dataclass
class Show:
    """Collects the first `count` clips and writes them into `folder`: `sheet.jpg` once all are
    there, and `clip-NN.webp` as each comes.

    fps: of the animated pictures. No clip is chosen: the order is that of the evaluation.
    """

    folder: Path
    count: int
    fps: float
    _clips: list[np.ndarray] = field(default_factory=list)
    _captions: list[str] = field(default_factory=list)

    def add(self, video: Tensor, caption: str) -> None:
        """video: uint8 `[T, 3, H, W]` on the CPU."""
        if len(self._clips) >= self.count:
            return
        frames = video.movedim(1, -1).numpy()
        self._animate(frames, self.folder / f"clip-{len(self._clips):02}.webp")
        self._clips.append(frames)
        self._captions.append(caption)
        if len(self._clips) == self.count:
            picture = sheet([clip / 255 for clip in self._clips], tuple(self._captions))
            picture.save(self.folder / "sheet.jpg", quality=80)

    def _animate(self, frames: np.ndarray, path: Path) -> None:
        first, *others = (Image.fromarray(frame) for frame in frames)
        first.save(
            path,
            save_all=True,
            append_images=others,
            duration=round(1000 / self.fps),
            loop=0,
            quality=75,
        )
