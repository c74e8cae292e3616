"""What a run looks like before it is finished: the clean latents that each step expects, in colours
that a linear map gives them, so that looking costs next to nothing of the time that is measured."""

import base64
import io

import torch
from PIL import Image
from torch import Tensor

from vdit_sparse.pipelines.families import DENOISERS

# Pixels of one frame of a preview.
WIDEST = 96


class Preview:
    """Watches a pipeline's transformer, and turns what passes into pictures when asked.

    The map from latents to red, green and blue is fitted to a picture of smooth colours that the
    VAE encodes, once for each pipeline: it holds for any VAE.
    """

    def __init__(self, pipe):
        self.pipe, self.last, self.handles = pipe, None, []
        self.colours = _colours(pipe)

    def __enter__(self) -> "Preview":
        if self.colours is not None:
            models = (getattr(self.pipe, name, None) for name in DENOISERS)
            self.handles = [
                model.register_forward_hook(self._see, with_kwargs=True)
                for model in models
                if model is not None
            ]
        return self

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()
        self.last = None

    def _see(self, model, args, kwargs, output) -> None:
        # The first forward of a step is the one with the prompt, where there are two.
        if self.last is None:
            noisy = kwargs.get("hidden_states", args[0] if args else None)
            self.last = noisy, kwargs.get("timestep"), output[0]

    def picture(self) -> dict | None:
        """What the step since the last call expects, as `encoded` gives it; None where there is no
        step, or no video in latents `[B, C, T, H, W]`."""
        if self.last is None:
            return None
        (noisy, timestep, output), self.last = self.last, None
        channels = len(self.colours) - 1
        if output.ndim != 5 or output.shape[1] != channels or timestep is None:
            return None
        # Flow matching: the transformer says how far it is from the noise to the video.
        sigma = (timestep.flatten()[0] / 1000).clamp(0, 1)
        clean = noisy[:1, :channels].float() - sigma * output[:1].float()
        return encoded(painted(clean[0], self.colours))


def painted(latents: Tensor, colours: Tensor) -> Tensor:
    """Latents `[C, T, H, W]` in colours `[C + 1, 3]` -> uint8 `[T, H', W', 3]` on the CPU."""
    if latents.shape[-1] > WIDEST:
        latents = torch.nn.functional.avg_pool2d(latents, -(-latents.shape[-1] // WIDEST))
    pixels = torch.einsum("cthw,cd->thwd", latents, colours[:-1].to(latents)) + colours[-1].to(
        latents
    )
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)


def encoded(frames: Tensor) -> dict:
    """Frames uint8 `[T, H, W, 3]` beside each other, as a PNG in a data URL."""
    count, height, width, _ = frames.shape
    strip = frames.permute(1, 0, 2, 3).reshape(height, count * width, 3)
    buffer = io.BytesIO()
    Image.fromarray(strip.numpy()).save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    url = f"data:image/png;base64,{data}"
    return {"url": url, "frames": count, "height": height, "width": width}


def _colours(pipe) -> Tensor | None:
    """The map `[C + 1, 3]` from normalised latents (and 1) to colours in [-1, 1], by least squares;
    None for a VAE without `encode` of videos."""
    vae = pipe.vae
    scale = getattr(vae.config, "scale_factor_spatial", None)
    if scale is None or not hasattr(vae.config, "latents_mean"):
        return None
    picture = _gradients(16 * scale).to(vae.device, vae.dtype)
    with torch.no_grad():
        latents = vae.encode(picture[None, :, None]).latent_dist.mode()[0, :, 0].float().cpu()
    mean, std = (torch.tensor(getattr(vae.config, f"latents_{name}")) for name in ("mean", "std"))
    latents = (latents - mean[:, None, None]) / std[:, None, None]
    small = torch.nn.functional.adaptive_avg_pool2d(picture.float().cpu(), latents.shape[-2:])
    known = torch.cat([latents.flatten(1), torch.ones(1, latents[0].numel())]).T
    # A little ridge, for a tiny VAE's channels may depend on each other.
    square = known.T @ known + 1e-3 * torch.eye(known.shape[1])
    return torch.linalg.solve(square, known.T @ small.flatten(1).T)


def _gradients(size: int) -> Tensor:
    """A picture `[3, size, size]` in [-1, 1] with all mixtures of colours in smooth patches."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 8, 8, generator=generator) * 2 - 1
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    return smooth[0].clamp(-1, 1)
