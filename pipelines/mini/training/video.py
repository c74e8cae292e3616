"""Captioned procedural video clips, rendered in batches with torch on CPU or GPU.

    generator = ProceduralVideo(device="cuda", height=256, width=448, frames=25)
    video, captions, specs = generator.batch(64, seed=0)  # float32 [64, 3, 25, 256, 448] in [-1, 1]

A clip is a moving place (12 kinds, with parallax, time of day, weather and a camera) and one to
three things on it (94 sprites and 6 shaded shapes) that move in one of 11 ways. Caption and pixels
come from the same `Spec`, so every word can be checked.
"""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vdit_sparse.pipelines.mini.training.captions import Spec, sample_spec
from vdit_sparse.pipelines.mini.training.objects import draw_things
from vdit_sparse.pipelines.mini.training.palette import Noise
from vdit_sparse.pipelines.mini.training.places_other import OTHER
from vdit_sparse.pipelines.mini.training.places_outdoor import OUTDOOR
from vdit_sparse.pipelines.mini.training.scene import Scene
from vdit_sparse.pipelines.mini.training.sprites import Sprites
from vdit_sparse.pipelines.mini.training.weather import weather

BACKGROUNDS = OUTDOOR | OTHER

_GROUP_BYTES = {"cpu": 2**26, "cuda": 2**30}
"""Largest size of one group's video, by device type: rendering holds about ten such tensors."""


class ProceduralVideo:
    """Renders clips of one size.

    device: where clips are rendered and returned; height, width: in pixels; frames: any number,
    every motion spans the clip.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        height: int = 256,
        width: int = 448,
        frames: int = 25,
    ):
        for what, value in (("height", height), ("width", width), ("frames", frames)):
            if value < 1:
                raise ValueError(f"Expected {what} of at least 1, got {value}.")
        self.device = torch.device(device)
        self.height, self.width, self.frames = height, width, frames
        self.noise = Noise(self.device)
        self.sprites = Sprites(self.device)

    def batch(
        self, count: int, seed: int, names: tuple[str, ...] | None = None
    ) -> tuple[Tensor, list[str], list[Spec]]:
        """`count` random clips: video float32 [count, 3, frames, height, width] in [-1, 1], their
        captions, their specs. The same seed gives the same clips, whatever their size.

        names: the things to choose from; default all.
        """
        rng = np.random.default_rng(seed)
        specs = [sample_spec(rng, names) for _ in range(count)]
        return self.render(specs), [spec.caption for spec in specs], specs

    @torch.no_grad()
    def render(self, specs: Sequence[Spec]) -> Tensor:
        """The clips of `specs`, float32 [len(specs), 3, frames, height, width] in [-1, 1]."""
        shape = (len(specs), 3, self.frames, self.height, self.width)
        video = torch.empty(shape, device=self.device)
        for places in self._groups(specs):
            group = self._render_group([specs[i] for i in places])
            for row, i in enumerate(places):  # an index list would make the device wait
                torch.mul(group[row].clamp_(0, 1), 2, out=video[i]).sub_(1)
        return video

    def _groups(self, specs: Sequence[Spec]) -> list[list[int]]:
        """Indices of clips that are rendered together: one place, falling number of things."""
        clip_bytes = 12 * self.frames * self.height * self.width
        most = max(1, _GROUP_BYTES.get(self.device.type, 2**28) // clip_bytes)
        order = sorted(range(len(specs)), key=lambda i: (specs[i].place, -_things(specs[i])))
        groups = []
        for _, members in groupby(order, key=lambda i: specs[i].place):
            indices = list(members)
            groups += [indices[i : i + most] for i in range(0, len(indices), most)]
        return groups

    def _render_group(self, specs: list[Spec]) -> Tensor:
        scene = Scene(tuple(specs), self.height, self.width, self.frames, self.noise)
        rgb = BACKGROUNDS[specs[0].place](scene)
        shape = (len(specs), 3, self.frames, self.height, self.width)
        rgb = rgb.expand(shape).contiguous() if rgb.shape != shape else rgb
        return weather(scene, draw_things(scene, rgb, self.sprites))


def _things(spec: Spec) -> int:
    return sum(item.count for item in spec.items)


def contact_sheet(
    video: Tensor, captions: Sequence[str], path: str | Path, columns: int = 5
) -> None:
    """Writes a PNG with `columns` frames of every clip, evenly spaced, under its caption.

    video: float [n, 3, T, H, W] in [-1, 1]. The picture is columns * W wide and n * (H + 16) high.
    """
    from PIL import Image, ImageDraw

    if len(video) != len(captions):
        raise ValueError(f"Expected a caption for each of {len(video)} clips, got {len(captions)}.")
    clips, _, frames, height, width = video.shape
    bar = 16
    picked = torch.linspace(0, frames - 1, columns).round().long()
    pixels = ((video[:, :, picked].float().clamp(-1, 1) + 1) * 127.5).round().byte()
    sheet = np.full((clips, height + bar, columns * width, 3), 255, np.uint8)
    rows = pixels.permute(0, 3, 2, 4, 1).reshape(clips, height, columns * width, 3)
    sheet[:, bar:] = rows.cpu().numpy()
    image = Image.fromarray(sheet.reshape(clips * (height + bar), columns * width, 3))
    draw = ImageDraw.Draw(image)
    for row, caption in enumerate(captions):
        draw.text((4, row * (height + bar) + 2), caption, fill="black")
    image.save(path, format="PNG")
