"""The error of a run's last latents against those of the dense run, before any decoder."""

import torch
from torch import Tensor


def latent_error(latents: Tensor, reference: Tensor) -> float:
    """||x - y|| / ||y||, 0 for equal latents. Arguments are those of `latent_error_per_frame`."""
    return _ratio(*_checked(latents, reference), dims=None).item()


def latent_error_per_frame(latents: Tensor, reference: Tensor) -> Tensor:
    """||x - y|| / ||y|| of each latent frame: float64 `[T]`.

    The norms are over channels and places. Where the reference is 0 everywhere the error is
    infinite, or 0 if the latents are 0 too.

    latents, reference: `[C, T, H, W]`, floating point and finite; else ValueError.
    """
    return _ratio(*_checked(latents, reference), dims=(0, 2, 3))


def _ratio(x: Tensor, y: Tensor, dims: tuple[int, ...] | None) -> Tensor:
    error = torch.linalg.vector_norm(x - y, dim=dims)
    size = torch.linalg.vector_norm(y, dim=dims)
    return torch.where(error == 0, torch.zeros_like(error), error / size)


def _checked(latents: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    pair = latents, reference
    if latents.ndim != 4 or latents.shape != reference.shape or latents.numel() == 0:
        raise ValueError(
            "Expected latents and a reference of one shape [C, T, H, W], not empty, got "
            f"{tuple(latents.shape)} and {tuple(reference.shape)}: give one sample at a time."
        )
    if not all(x.is_floating_point() and x.isfinite().all() for x in pair):
        raise ValueError(
            f"Expected finite floating-point latents, got {latents.dtype} and {reference.dtype}, "
            "or values that are not finite: check the run."
        )
    return latents.double(), reference.double()
