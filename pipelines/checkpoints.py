"""Published checkpoints as data: sizes, geometry, defaults and presets, without their weights."""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from vdit_sparse.grid import Grid

FILE = Path(__file__).with_suffix(".toml")
# Guidance branches of a step: two calls of the transformer, two batch rows of one, or no guidance.
GUIDANCE = ("calls", "batch", "none")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What is known of a model without its weights.

    name: short name, for the command line; hub: its id; pipeline, transformer: its classes.
    billions: parameters of one transformer, 10^9; experts: how many transformers share the steps.
    config: what differs from the defaults of the transformer's class.
    layers, heads, head_dim: of the visual self-attention, all of its layers.
    temporal, spatial: frames and pixels (a side) that the autoencoder makes one latent of.
    first_frame: frames that it encodes alone, before those in groups of `temporal`; 0 or 1.
    patch_t, patch: latents that one token covers, in time and a side.
    text: tokens that are not video, at most: of the prompt, and of reference images of the same
        size as the target where a pipeline edits one. joint: whether they are in the sequence of
        the self-attention.
    guidance: one of `GUIDANCE`, as the checkpoint is meant to be used.
    size, frames, steps: (height, width) in pixels, frames and steps it is meant for; 1 frame is an
        image.
    encoders: parameters of its text and image encoders, 10^9.
    presets: names of the family's presets that are meant for it.
    """

    name: str = ""
    hub: str = ""
    pipeline: str = ""
    transformer: str
    billions: float = 0.0
    config: Mapping = field(default_factory=lambda: MappingProxyType({}))
    layers: int
    heads: int
    head_dim: int = 128
    temporal: int = 4
    spatial: int = 8
    first_frame: int = 1
    patch_t: int = 1
    patch: int = 2
    text: int = 512
    joint: bool = False
    guidance: str = "calls"
    experts: int = 1
    size: tuple[int, int] = (480, 832)
    frames: int = 1
    steps: int = 50
    encoders: float = 0.0
    presets: tuple[str, ...] = ()

    @property
    def pixels(self) -> int:
        """Height and width must be multiples of so many pixels."""
        return self.spatial * self.patch

    @property
    def branches(self) -> int:
        """Guidance branches of a step."""
        return 1 if self.guidance == "none" else 2

    @property
    def image(self) -> bool:
        """Whether the model makes images, or is meant to."""
        return self.frames == 1

    def latent(self, height: int, width: int, frames: int) -> tuple[int, int, int]:
        """Latent frames, height and width of a video in pixels. Raises ValueError, with the nearest
        sizes that the model takes, for one that it does not."""
        wrong = [
            f"{name} must be a multiple of {self.pixels} pixels, got {given}; nearest: {near}"
            for name, given in (("height", height), ("width", width))
            if (near := _nearest(given, self.pixels, 0))
        ]
        if self.temporal == 1:
            if frames != 1:
                wrong.append(f"it makes images: frames must be 1, got {frames}")
        elif near := _nearest(frames, self.temporal, self.first_frame):
            more = "1 more than " if self.first_frame else ""
            wrong.append(
                f"frames must be {more}a multiple of {self.temporal}, got {frames}; nearest: {near}"
            )
        if wrong:
            raise ValueError("; ".join(wrong) + ".")
        count = (frames - self.first_frame) // self.temporal + self.first_frame
        if self.temporal == 1:
            count = 1
        return count, height // self.spatial, width // self.spatial

    def grid(self, height: int, width: int, frames: int) -> Grid:
        """Tokens of a video in pixels, as the self-attention sees them. Raises as `latent`."""
        f, h, w = self.latent(height, width, frames)
        text = self.text if self.joint else 0
        # CogVideoX 1.5 pads the latent frames to whole patches.
        return Grid(math.ceil(f / self.patch_t), h // self.patch, w // self.patch, text)


def checkpoint_of(name: str) -> Checkpoint | None:
    """The published checkpoint of this short name or hub id; None if it is not in the table."""
    return next((one for one in checkpoints() if name in (one.name, one.hub)), None)


def checkpoint_like(transformer: str, config: Mapping, vae: Mapping) -> Checkpoint:
    """What a model in files is, from the configurations of its transformer and autoencoder: the
    geometry of its class's checkpoints, and what the files say themselves.

    Raises ValueError for a class of which there is no checkpoint to learn from.
    """
    of_class = [one for one in checkpoints() if one.transformer == transformer]
    if not of_class:
        known = sorted({one.transformer for one in checkpoints()})
        raise ValueError(f"Nothing is known of {transformer}; known: {', '.join(known)}.")
    # The published model that shares most of its configuration says what files do not.
    near = max(of_class, key=lambda one: _alike(one.config, config))
    said = {"temporal": _said(vae, "temporal"), "spatial": _said(vae, "spatial")}
    if transformer.endswith("2DModel"):
        said["spatial"] = _halvings(vae)
    patch, patch_t = config.get("patch_size"), config.get("patch_size_t")
    if isinstance(patch, list | tuple) and len(patch) == 3:
        patch_t, patch = patch[0], patch[1]
    if transformer not in PACKED:
        said |= {"patch": patch, "patch_t": patch_t}
    return replace(
        near,
        **{key: value for key, value in said.items() if isinstance(value, int)},
        name="",
        hub="",
        config=MappingProxyType(dict(config)),
        presets=(),
    )


# Their pipelines pack two by two latents into channels: the configuration says 1.
PACKED = ("ChromaTransformer2DModel", "Flux2Transformer2DModel", "FluxTransformer2DModel")


@lru_cache(maxsize=1)
def checkpoints() -> tuple[Checkpoint, ...]:
    """All published checkpoints in the table, by class and then in its order."""
    with FILE.open("rb") as file:
        table = tomllib.load(file)
    found = []
    for transformer, section in table.items():
        shared = {key: value for key, value in section.items() if key != "checkpoint"}
        found += [_checkpoint(transformer, shared | own) for own in section["checkpoint"]]
    return tuple(found)


def _checkpoint(transformer: str, values: dict) -> Checkpoint:
    for name in ("size", "presets"):
        if name in values:
            values[name] = tuple(values[name])
    values["config"] = MappingProxyType(values.get("config", {}))
    return Checkpoint(transformer=transformer, **values)


def _nearest(given: int, unit: int, over: int) -> str:
    """The nearest values that are `over` more than a multiple of `unit`, in words; empty if
    `given` is one."""
    if given > 0 and (given - over) % unit == 0 and given >= (over or unit):
        return ""
    low = max((given - over) // unit, 0) * unit + over
    return " and ".join(str(value) for value in (low, low + unit) if value > 0)


def _said(vae: Mapping, axis: str) -> object:
    keys = (f"scale_factor_{axis}", f"{axis}_compression_ratio")
    return next((vae[key] for key in keys if vae.get(key)), None)


def _halvings(vae: Mapping) -> int | None:
    """Pixels of a latent's side, from the levels of an image autoencoder, or of Qwen's."""
    if vae.get("block_out_channels"):
        return 2 ** (len(vae["block_out_channels"]) - 1)
    return 2 ** len(vae["temperal_downsample"]) if vae.get("temperal_downsample") else None


def _alike(published: Mapping, config: Mapping) -> int:
    same = [_plain(config.get(key)) == _plain(value) for key, value in published.items()]
    return sum(same) - sum(not one for one in same)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
