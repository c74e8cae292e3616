"""Where the denoiser's batches come from: sets of latents per size, and the kinds of batches."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vdit_sparse.pipelines.mini.training.checkpoints import (
    Checkpoints,
    load_autoencoder,
    load_tokenizer,
)
from vdit_sparse.pipelines.mini.training.clips import SEEDS, ClipShape, Limit
from vdit_sparse.pipelines.mini.training.curriculum import DenoiserSettings
from vdit_sparse.pipelines.mini.training.latents import CAPTION_TOKENS, LatentSet, cache_latents
from vdit_sparse.pipelines.mini.training.models import Sizes
from vdit_sparse.pipelines.mini.training.pacing import report

DROP_CAPTION = 0.1
PAD_LENGTHS, PAD_SHARES = (64, 128, 226, 512), (0.7, 0.1, 0.1, 0.1)
# Shares of a stage's rendering time, while all three are wanted.
_LONG_TIME, _STILL_TIME = 0.15, 0.15
_HEIGHT_SEEDS, _FRAME_SEEDS, _CALL_SEEDS = 1000, 10_000, 1000


class Batch(NamedTuple):
    """One step's data.

    latents: `[batch, channels, frames, height, width]` float32, normalised; tokens: `[batch, 64]`;
    shift: of the noise levels; pad_length: text length that the transformer sees.
    """

    latents: Tensor
    tokens: Tensor
    shift: float
    pad_length: int


@dataclass(frozen=True, eq=False)
class Kind:
    """Batches of one shape: so many clips of `sets`, cut to the first latent frames.

    frames: latent frames; pads: whether the text is padded to several lengths, or only to 64.
    """

    sets: tuple[LatentSet, ...]
    batch: int
    frames: int
    shift: float
    pads: bool = True

    def draw(self, dice: random.Random) -> Batch:
        """Draws a batch from one of the sets, each as often as it has clips."""
        (data,) = dice.choices(self.sets, [len(data.latents) for data in self.sets])
        latents, tokens = data.draw(self.batch, DROP_CAPTION, self.frames)
        # Half of an image's tokens would be padding at 226: only clips learn the longer ones.
        lengths, shares = (PAD_LENGTHS, PAD_SHARES) if self.pads else ((CAPTION_TOKENS,), (1,))
        return Batch(latents, tokens, self.shift, dice.choices(lengths, shares)[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the batches' latents."""
        _, channels, _, height, width = self.sets[0].latents.shape
        return (self.batch, channels, self.frames, height, width)


class Batches:
    """A stage's batches: clips, single or few latent frames ("images"), and long clips.

    Args:
        library: renders what it has not yet.
        shape: of the clips.
        settings: of the stage.
    """

    def __init__(
        self, library: "LatentLibrary", shape: ClipShape, settings: DenoiserSettings
    ) -> None:
        self.settings = settings
        long = settings.long_clips if shape.frames > 1 else 0
        stills = settings.stills if shape.frames > 1 else 0
        spare = 1 - _LONG_TIME * bool(long) - _STILL_TIME * bool(stills)
        seconds = settings.render_seconds
        data = library.obtain(shape, Limit(settings.clips, seconds * spare), settings)
        frames, batch = data.latents.shape[2], settings.batch
        self.clips = Kind((data,), batch, frames, settings.shift, pads=frames > 1)
        still = self._more(library, (shape, 1, stills, _STILL_TIME))
        self.images = []
        for count in settings.frame_counts() if settings.images or settings.images_end else ():
            if not 1 <= count <= frames:
                raise ValueError(f"expected image_frames from 1 to {frames}, got {count}")
            sets = (data, still) if still and count == 1 else (data,)
            size = max(1, batch * frames // count)
            self.images.append(Kind(sets, size, count, settings.image_shift, pads=False))
        far = self._more(library, (shape, 2 * shape.frames - 1, long, _LONG_TIME))
        self.long = far and Kind(
            (far,), max(1, batch * 3 // 8), far.latents.shape[2], settings.shift
        )

    def _more(self, library, wanted: tuple[ClipShape, int, int, float]) -> LatentSet | None:
        shape, frames, count, share = wanted
        if not count:
            return None
        other = ClipShape(shape.height, shape.width, frames, shape.device)
        limit = Limit(count, self.settings.render_seconds * share)
        return library.obtain(other, limit, self.settings)

    def kinds(self) -> list[Kind]:
        """Returns every kind that this stage can draw; each is a shape to compile for."""
        only_images = self.settings.images == self.settings.images_end == 1
        others = [] if only_images else [self.clips, *([self.long] if self.long else [])]
        return others + self.images

    def choose(self, dice: random.Random, fraction: float) -> Kind:
        """Decides what kind the next batch has, at `fraction` (0 to 1) of the stage's time."""
        if self.images and dice.random() < self.settings.image_share(fraction):
            return dice.choice(self.images)
        if self.long and dice.random() < self.settings.long_share:
            return self.long
        return self.clips


class LatentLibrary:
    """Sets of latents by size, each rendered once in a process, and kept on disk if wanted.

    A kept file belongs to one autoencoder: after another training of it, it is rendered anew.

    Args:
        checkpoints: has the autoencoder; kept latents lie in its folder, in `latents/`.
        sizes: of the autoencoder.
        device: where the latents stay.
    """

    def __init__(self, checkpoints: Checkpoints, sizes: Sizes, device: str) -> None:
        self.folder: Path = checkpoints.folder / "latents"
        self._vae = load_autoencoder(checkpoints, sizes).to(device)
        self._tokenizer = load_tokenizer(checkpoints.tokenizer)
        self._sets: dict[tuple[int, int, int], LatentSet] = {}

    def obtain(self, shape: ClipShape, limit: Limit, settings: DenoiserSettings) -> LatentSet:
        """Returns latents of clips of `shape`, at least `limit.clips` if the seconds suffice."""
        size = (shape.height, shape.width, shape.frames)
        if size not in self._sets:
            kept, calls = self._read(size, shape.device, settings.phrasings)
            calls = max(calls, settings.earlier_calls)
            data = self._render(shape, limit, settings.phrasings, (kept, calls))
            self._sets[size] = data
            if settings.keep_latents and data is not kept:
                self._write(size, data, calls + 1)
        return self._sets[size]

    def _render(self, shape, limit: Limit, phrasings: int, before) -> LatentSet:
        kept, calls = before
        missing = limit.clips - (len(kept.latents) if kept else 0)
        if missing <= 0:
            return kept
        # Every size gets its own clips, and every call more of them.
        seed = SEEDS["denoiser"] + _HEIGHT_SEEDS * shape.height + _FRAME_SEEDS * shape.frames
        seed += _CALL_SEEDS * calls
        more = cache_latents(
            self._vae, self._tokenizer, shape, Limit(missing, limit.seconds), seed, phrasings
        )
        return kept.joined(more) if kept else more

    def _path(self, size: tuple[int, int, int]) -> Path:
        return self.folder / ("x".join(map(str, size)) + ".pt")

    def _write(self, size: tuple[int, int, int], data: LatentSet, calls: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"latents": data.latents, "tokens": data.tokens, "empty": data.empty}
        mark = {"autoencoder": self._mark(), "calls": calls}
        torch.save(content | mark, self._path(size))
        report(f"kept {self._path(size)}, {data.latents.nbytes / 2**30:.1f} GiB")

    def _read(self, size, device: str, phrasings: int) -> tuple[LatentSet | None, int]:
        if not self._path(size).is_file():
            return None, 0
        content = torch.load(self._path(size), map_location=device, weights_only=True)
        if (content["autoencoder"], content["tokens"].shape[1]) != (self._mark(), phrasings):
            report(f"{self._path(size)} is of another autoencoder or number of phrasings: not used")
            return None, 0
        data = LatentSet(content["latents"], content["tokens"], content["empty"])
        report(f"read {tuple(data.latents.shape)} from {self._path(size)}")
        return data, content["calls"]

    def _mark(self) -> list[float]:
        return [*self._vae.config.latents_mean, *self._vae.config.latents_std]
