"""The canvas that places, objects and weather paint on: coordinates, light, and a few brushes.

x runs to the right from -aspect to aspect, y downwards from -1 to 1, t from 0 to 1 over the clip,
whatever its resolution and number of frames.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from vdit_sparse.pipelines.mini.training.captions import Spec
from vdit_sparse.pipelines.mini.training.palette import Noise, hsv_to_rgb, lattice, uniform

LIGHT = {
    "": (1.0, 1.0, 1.0),
    "day": (1.0, 1.0, 1.0),
    "sunset": (0.98, 0.72, 0.62),
    "night": (0.46, 0.52, 0.76),
}
"""Time of day -> colour of the light that falls on things."""

_PAN = {"pan right": 1.0, "pan left": -1.0}
_TILT = -0.35
_ZOOM = 0.45


@dataclass(frozen=True)
class Scene:
    """A group of clips at one kind of place.

    specs: the clips; height, width, frames: of the video; noise: the texture on the device.
    """

    specs: tuple[Spec, ...]
    height: int
    width: int
    frames: int
    noise: Noise

    @cached_property
    def device(self) -> torch.device:
        return self.noise.texture.device

    @cached_property
    def aspect(self) -> float:
        return self.width / self.height

    @cached_property
    def pixel(self) -> float:
        """A pixel's side, in units of half the height."""
        return 2.0 / self.height

    # Coordinates ------------------------------------------------------------------------------

    @cached_property
    def t(self) -> Tensor:
        return torch.linspace(0, 1, self.frames, device=self.device).view(1, 1, -1, 1, 1)

    @cached_property
    def screen_x(self) -> Tensor:
        return self._pixel_centres(self.width, self.aspect).view(1, 1, 1, 1, -1)

    @cached_property
    def screen_y(self) -> Tensor:
        return self._pixel_centres(self.height, 1.0).view(1, 1, 1, -1, 1)

    def _pixel_centres(self, count: int, limit: float) -> Tensor:
        return (torch.arange(count, device=self.device) + 0.5) / count * (2 * limit) - limit

    @cached_property
    def zoom(self) -> Tensor:
        """Magnification [clips, 1, T, 1, 1]."""
        zoom_in = self.column([spec.camera == "zoom in" for spec in self.specs])
        zoom_out = self.column([spec.camera == "zoom out" for spec in self.specs])
        return 1 + _ZOOM * (zoom_in * self.t + zoom_out * (1 - self.t))

    @cached_property
    def pan(self) -> Tensor:
        """How far the camera has moved to the right [clips, 1, T, 1, 1]."""
        side = self.column([_PAN.get(spec.camera, 0.0) for spec in self.specs])
        return side * self.uniform("pan", 0.5, 1.1) * self.t

    @cached_property
    def x(self) -> Tensor:
        """Before panning; a layer at a distance adds its own share of `pan`."""
        return self.screen_x / self.zoom

    @cached_property
    def y(self) -> Tensor:
        tilts = self.column([spec.camera == "tilt up" for spec in self.specs])
        return self.screen_y / self.zoom + _TILT * tilts * self.t

    # A clip's own numbers ---------------------------------------------------------------------

    @cached_property
    def seeds(self) -> np.ndarray:
        return np.array([spec.seed for spec in self.specs], np.uint64)

    def column(self, values) -> Tensor:
        """One number for every clip, [clips, 1, 1, 1, 1] on the device."""
        return self.upload(values).view(-1, 1, 1, 1, 1)

    def upload(self, values) -> Tensor:
        # non_blocking spares the wait for the whole stream that a plain copy implies.
        array = torch.from_numpy(np.asarray(values, np.float32))
        return array.to(self.device, non_blocking=True)

    def uniform(self, key: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        """A random number in [low, high) for every clip, from its seed and `key`."""
        return self.column(low + (high - low) * uniform(self.seeds, key))

    def cells(self, i: Tensor, j: Tensor | float, key: str) -> Tensor:
        """A random number in [0, 1) for every clip and cell (i, j) of a lattice."""
        return lattice(i, j, self.uniform(key))

    def colour(self, *rgb: float) -> Tensor:
        """The same colour for every clip."""
        return torch.tensor(rgb).to(self.device, non_blocking=True).view(1, 3, 1, 1, 1)

    def varied(self, key: str, rgb: tuple[float, float, float], spread: float = 0.05) -> Tensor:
        """A colour near `rgb` for every clip, [clips, 3, 1, 1, 1]."""
        draws = np.stack([uniform(self.seeds, f"{key} {c}") for c in range(3)], -1)
        colours = np.clip(np.array(rgb) + (2 * draws - 1) * spread, 0, 1)
        return self.upload(colours).view(-1, 3, 1, 1, 1)

    def hue(self, hue: Tensor, saturation: float, value: float) -> Tensor:
        """hue [clips, 1, 1, 1, 1] in degrees -> colours [clips, 3, 1, 1, 1]."""
        ones = torch.ones_like(hue)
        return hsv_to_rgb(hue % 360, ones * saturation, ones * value, dim=1).squeeze(2)

    # Time of day ------------------------------------------------------------------------------

    def times(self, name: str) -> Tensor:
        """1 where the clip plays at that time of day, else 0; [clips, 1, 1, 1, 1]."""
        return self.column([spec.time == name for spec in self.specs])

    @cached_property
    def night(self) -> Tensor:
        return self.times("night")

    @cached_property
    def sunset(self) -> Tensor:
        return self.times("sunset")

    @cached_property
    def light(self) -> Tensor:
        return self.upload([LIGHT[spec.time] for spec in self.specs]).view(-1, 3, 1, 1, 1)

    # Brushes ----------------------------------------------------------------------------------

    def cover(self, signed: Tensor) -> Tensor:
        """1 where `signed` (a distance, in units of half the height) is positive, with a soft edge
        one pixel wide.
        """
        return (signed / self.pixel + 0.5).clamp(0, 1)

    def over(self, base: Tensor, colour: Tensor, signed: Tensor) -> Tensor:
        """Paints `colour` on `base` where `signed` is positive."""
        return torch.lerp(*torch.broadcast_tensors(base, colour), self.cover(signed))

    def ridge(
        self, key: str, x: Tensor, frequency: float, height: float, jag: float = 0.0
    ) -> Tensor:
        """The height of hills over x: four octaves of sines; of triangle waves as jag nears 1."""
        total = 0.0
        for octave, (stretch, share) in enumerate(
            ((1, 0.55), (1.9, 0.28), (3.7, 0.12), (7.1, 0.06))
        ):
            phase = self.uniform(f"{key} octave {octave}", 0, 2 * math.pi)
            sine = torch.sin(x * (frequency * stretch) + phase)
            if jag:
                triangle = torch.asin(sine.clamp(-0.999, 0.999)) * (2 / math.pi)
                sine = sine * (1 - jag) + triangle * jag * (1.5 if octave else 1.2)
            total = total + height * share * sine
        return total


def mix(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """a where share is 0, b where it is 1; broadcasts."""
    return torch.lerp(*torch.broadcast_tensors(a, b), share)
