"""Rendered clips on the training device, within a time limit."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vdit_sparse.pipelines.mini.training.captions import Spec
from vdit_sparse.pipelines.mini.training.pacing import report, stopping
from vdit_sparse.pipelines.mini.training.video import ProceduralVideo

# First seeds of the generator's batches: every use has its own million, so none sees another's.
SEEDS = {"held_out": 0, "autoencoder": 1_000_000, "denoiser": 2_000_000}

# The generator draws all clips of one place together, so that large batches need fewer launches.
_BATCH_BYTES = {"cuda": 3 * 2**31, "cpu": 2**26}
# Single frames are small: their batches end here, or the time limit would hardly be looked at.
_BATCH_CLIPS = 1024


@dataclass(frozen=True)
class ClipShape:
    """Size of a clip in pixels and frames, and where it may be rendered.

    Attributes:
        height: pixels, divisible by 16.
        width: pixels, divisible by 16.
        frames: `4 k + 1`.
        device: torch device of generator and clips.
    """

    height: int = 256
    width: int = 448
    frames: int = 25
    device: str = "cuda"

    def __post_init__(self) -> None:
        if self.height % 16 or self.width % 16 or self.frames % 4 != 1:
            raise ValueError(
                f"expected sides divisible by 16 and 4 k + 1 frames, got {self.height} x "
                f"{self.width} and {self.frames} frames"
            )


@dataclass(frozen=True)
class Limit:
    """When to stop rendering: after so many clips or so many seconds, whichever comes first."""

    clips: int
    seconds: float = float("inf")


def render(shape: ClipShape, limit: Limit, seed: int) -> Iterator[tuple[Tensor, list[str]]]:
    """Yields batches of `(video [batch, 3, frames, height, width] float32, captions)`.

    At least one batch comes, however short the time. The last batch is cut to `limit.clips`.
    """
    for video, specs in render_specs(shape, limit, seed):
        yield video, [spec.caption for spec in specs]


def render_specs(shape: ClipShape, limit: Limit, seed: int) -> Iterator[tuple[Tensor, list[Spec]]]:
    """Yields what `render` yields, with the clips' whole descriptions in place of captions.

    Every batch has the next seed, counted on from `seed`.
    """
    clip_bytes = 12 * shape.frames * shape.height * shape.width
    batch = max(1, _BATCH_BYTES.get(torch.device(shape.device).type, 2**28) // clip_bytes)
    batch = min(batch, _BATCH_CLIPS)
    generator = ProceduralVideo(
        device=shape.device, height=shape.height, width=shape.width, frames=shape.frames
    )
    start, done = time.perf_counter(), 0
    while not done or (
        done < limit.clips and time.perf_counter() - start < limit.seconds and not stopping()
    ):
        count = min(batch, limit.clips - done)
        video, _, specs = generator.batch(count, seed)
        yield video, specs
        if shape.device.startswith("cuda"):
            # Without this the clock would only time the queueing of kernels.
            torch.cuda.synchronize()
        done, seed = done + count, seed + 1


def render_bytes(shape: ClipShape, limit: Limit, seed: int) -> Tensor:
    """Returns rendered clips `[clips, 3, frames, height, width]` as uint8, 0 to 255."""
    start = time.perf_counter()
    clips = torch.cat([to_bytes(video) for video, _ in render(shape, limit, seed)])
    seconds = time.perf_counter() - start
    report(f"rendered {tuple(clips.shape)} in {seconds:.1f} s, {len(clips) / seconds:.0f} clips/s")
    return clips


def to_bytes(video: Tensor) -> Tensor:
    """Maps [-1, 1] to uint8 0 to 255, rounding and clipping."""
    return ((video.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_bytes(clips: Tensor) -> Tensor:
    """Maps uint8 0 to 255 to float32 [-1, 1]."""
    return clips.float() / 127.5 - 1


def crops(clips: Tensor, count: int, side: int) -> Tensor:
    """Returns `count` random squares, over all frames, as float32 in [-1, 1].

    One gather on the clips' device: no index ever comes back to the CPU.

    Args:
        clips: `[clips, 3, frames, height, width]` uint8.
        count: squares.
        side: pixels; at most the clips' height.

    Returns:
        `[count, 3, frames, side, side]`.
    """
    device, (height, width) = clips.device, clips.shape[-2:]
    if side > min(height, width):
        raise ValueError(f"expected crops of at most {min(height, width)} pixels, got {side}")
    clip = torch.randint(len(clips), (count, 1, 1), device=device)
    corner_y = torch.randint(height - side + 1, (count, 1, 1), device=device)
    corner_x = torch.randint(width - side + 1, (count, 1, 1), device=device)
    span = torch.arange(side, device=device)
    rows = corner_y + span[None, :, None]
    columns = corner_x + span[None, None, :]
    squares = clips[clip, :, :, rows, columns]
    return from_bytes(squares.permute(0, 3, 4, 1, 2).contiguous())
