"""A whole clip through the residual Wan autoencoder in one pass, instead of four frames at a time.

`AutoencoderKLWan` walks over time in chunks with a cache per convolution, to bound the memory. Its
convolutions are causal, so the chunks together are one convolution over the whole clip; only the
first frame differs (it is never merged with, or split into, others). One pass gives the same
numbers with a seventh of the kernel launches, which is what training and caching latents need.
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanMidBlock,
    WanResample,
    WanResidualBlock,
    WanResidualDownBlock,
    WanResidualUpBlock,
    WanRMS_norm,
    patchify,
    unpatchify,
)
from torch import Tensor


def activate_and_pad(hidden: Tensor, gamma: Tensor, dtype: torch.dtype) -> Tensor:
    """Normalises over channels, scales, applies SiLU, and puts two empty frames before the clip.

    Args:
        hidden: `[batch, channels, frames, height, width]`.
        gamma: `[channels, 1, 1, 1]`.
        dtype: of the result.

    Returns:
        `[batch, channels, frames + 2, height, width]`, ready for a causal convolution over three
        frames. This is `WanRMS_norm`, the nonlinearity and the temporal part of
        `WanCausalConv3d`'s padding, in one function that a compiler turns into one kernel.
    """
    normalised = F.normalize(hidden.float(), dim=1).to(hidden.dtype)
    activated = F.silu(normalised * hidden.shape[1] ** 0.5 * gamma)
    return F.pad(activated.to(dtype), (0, 0, 0, 0, 2, 0))


class WholeClip:
    """Encodes and decodes whole clips with the weights of a residual `AutoencoderKLWan`.

    Equal to `vae.encode` and `vae.decode` (without their clamp) up to rounding, differentiable,
    for clips of `4 k + 1` frames.

    Args:
        vae: with `is_residual=True`; its weights are used in place, not copied.
        compiled: compile the elementwise part between convolutions (worth it on a GPU only).
    """

    def __init__(self, vae: AutoencoderKLWan, *, compiled: bool = False) -> None:
        if not vae.config.is_residual:
            raise ValueError(
                "WholeClip expects an autoencoder with is_residual=True (the Wan 2.2 kind), got "
                "is_residual=False: use vae.encode and vae.decode"
            )
        self.vae = vae
        self._activate = activate_and_pad
        if compiled:
            self._activate = torch.compile(activate_and_pad, dynamic=True)

    def encode(self, video: Tensor) -> Tensor:
        """Returns the posterior's mean and log variance, stacked.

        Args:
            video: `[batch, 3, 4 k + 1, height, width]` in [-1, 1]; sides divisible by 8.

        Returns:
            `[batch, 2 * latent_channels, k + 1, height / 8, width / 8]`.
        """
        frames = video.shape[2]
        if frames % 4 != 1:
            raise ValueError(f"expected 4 k + 1 frames (5, 9, ..., 25, ...), got {frames}")
        encoder = self.vae.encoder
        hidden = encoder.conv_in(patchify(video, self.vae.config.patch_size))
        for block in encoder.down_blocks:
            hidden = self._down(block, hidden)
        hidden = self._middle(encoder.mid_block, hidden)
        hidden = self._convolve(encoder.norm_out, encoder.conv_out, hidden)
        return self.vae.quant_conv(hidden)

    def decode(self, latents: Tensor) -> Tensor:
        """Returns the video `[batch, 3, 4 (f - 1) + 1, 8 h, 8 w]` of latents `[batch, z, f, h, w]`.

        Latents are the posterior's, not normalised by the config's mean and deviation; values are
        not clamped to [-1, 1].
        """
        decoder = self.vae.decoder
        hidden = decoder.conv_in(self.vae.post_quant_conv(latents))
        hidden = self._middle(decoder.mid_block, hidden)
        for block in decoder.up_blocks:
            hidden = self._up(block, hidden)
        hidden = self._convolve(decoder.norm_out, decoder.conv_out, hidden)
        return unpatchify(hidden, self.vae.config.patch_size)

    def _down(self, block: WanResidualDownBlock, hidden: Tensor) -> Tensor:
        # AvgDown3D pads an odd clip in front with one empty frame: just what it does to frame 0.
        shortcut = block.avg_shortcut(hidden)
        for residual in block.resnets:
            hidden = self._residual(residual, hidden)
        if block.downsampler is not None:
            hidden = _shrink(block.downsampler, hidden)
        return hidden + shortcut

    def _up(self, block: WanResidualUpBlock, hidden: Tensor) -> Tensor:
        shortcut = None
        if block.avg_shortcut is not None:
            shortcut = block.avg_shortcut(hidden, first_chunk=True)
        for residual in block.resnets:
            hidden = self._residual(residual, hidden)
        if block.upsampler is not None:
            hidden = _grow(block.upsampler, hidden)
        return hidden if shortcut is None else hidden + shortcut

    def _middle(self, block: WanMidBlock, hidden: Tensor) -> Tensor:
        hidden = self._residual(block.resnets[0], hidden)
        for attention, residual in zip(block.attentions, block.resnets[1:], strict=True):
            hidden = self._residual(residual, attention(hidden))
        return hidden

    def _residual(self, block: WanResidualBlock, hidden: Tensor) -> Tensor:
        shortcut = block.conv_shortcut(hidden)
        hidden = self._convolve(block.norm1, block.conv1, hidden)
        return self._convolve(block.norm2, block.conv2, hidden) + shortcut

    def _convolve(self, norm: WanRMS_norm, conv: WanCausalConv3d, hidden: Tensor) -> Tensor:
        kind = hidden.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else hidden.dtype
        padded = self._activate(hidden, norm.gamma, dtype)
        return F.conv3d(padded, conv.weight, conv.bias, padding=(0, 1, 1))


def _frame_by_frame(resample: WanResample, hidden: Tensor) -> Tensor:
    batch, _, frames = hidden.shape[:3]
    images = resample.resample(hidden.transpose(1, 2).flatten(0, 1))
    return images.unflatten(0, (batch, frames)).transpose(1, 2)


def _shrink(resample: WanResample, hidden: Tensor) -> Tensor:
    hidden = _frame_by_frame(resample, hidden)
    if resample.mode == "downsample3d" and hidden.shape[2] > 1:
        hidden = torch.cat([hidden[:, :, :1], resample.time_conv(hidden)], dim=2)
    return hidden


def _grow(resample: WanResample, hidden: Tensor) -> Tensor:
    if resample.mode == "upsample3d" and hidden.shape[2] > 1:
        pairs = resample.time_conv(hidden[:, :, 1:]).unflatten(1, (2, -1))
        later = pairs.movedim(1, 3).flatten(2, 3)
        hidden = torch.cat([hidden[:, :, :1], later], dim=2)
    return _frame_by_frame(resample, hidden)
