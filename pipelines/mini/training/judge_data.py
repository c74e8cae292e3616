"""What the judge learns from: labelled renders, some of them through the autoencoder."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vdit_sparse.pipelines.mini.training.captions import Spec
from vdit_sparse.pipelines.mini.training.clips import Limit, from_bytes, to_bytes
from vdit_sparse.pipelines.mini.training.judge import resample
from vdit_sparse.pipelines.mini.training.judge_labels import classes, labels
from vdit_sparse.pipelines.mini.training.pacing import report, stopping
from vdit_sparse.pipelines.mini.training.video import ProceduralVideo
from vdit_sparse.pipelines.mini.training.whole_clip import WholeClip

# First seeds of batches, in millions that nothing else of the training uses (clips.SEEDS).
JUDGE_SEED, AUTOENCODED_SEED, HELD_OUT_SEED = 20_000_000, 21_000_000, 22_000_000

# Large batches cost fewer launches; encoding 32 clips of full size (34 MB each) takes about 30 GiB.
_BATCH_BYTES = {"cuda": 3 * 2**30, "cpu": 2**26}
_CODED_BYTES = 2**28


@dataclass(frozen=True)
class Pool:
    """Clips as the judge sees them, with their answers, on one device.

    Attributes:
        clips: `[n, 3, 8, 64, 112]` uint8.
        answers: `[n, heads]` int64, the class of every head in the order of `classes()`.
        specs: of the clips.
    """

    clips: Tensor
    answers: Tensor
    specs: tuple[Spec, ...]

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Random clips float32 in [-1, 1] and their answers, with replacement, without a sync."""
        chosen = torch.randint(len(self.clips), (count,), device=self.clips.device)
        return from_bytes(self.clips[chosen]), self.answers[chosen]


def targets(specs: list[Spec]) -> Tensor:
    """The right answers as class numbers, int64 `[specs, heads]` on the CPU."""
    names = classes()
    rows = [labels(spec) for spec in specs]
    return torch.tensor(
        [[names[head].index(row[head]) for head in names] for row in rows], dtype=torch.int64
    )


def fill_pool(
    size: tuple[int, int, int],
    device: str,
    limit: Limit,
    seed: int,
    coder: WholeClip | None = None,
) -> Pool:
    """Renders labelled clips until the limit; at least one batch comes, however short the time.

    size: height, width and frames of the renders (`4 k + 1` frames where there is a coder).
    coder: puts every clip through this autoencoder (posterior's mean) before it is resampled.
    """
    clips, specs = [], []
    start = time.perf_counter()
    for video, found in _renders(size, device, limit, seed):
        coded = video if coder is None else _coded(coder, video)
        clips.append(to_bytes(resample(coded)))
        specs += found
        if device.startswith("cuda"):
            # Without this the clock would only time the queueing of kernels.
            torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    report(f"{len(specs)} clips of {size} for the judge, {len(specs) / seconds:.0f} clips/s")
    return Pool(torch.cat(clips), targets(specs).to(device), tuple(specs))


def _renders(
    size: tuple[int, int, int], device: str, limit: Limit, seed: int
) -> Iterator[tuple[Tensor, list[Spec]]]:
    height, width, frames = size
    generator = ProceduralVideo(device, height, width, frames)
    most = _BATCH_BYTES.get(torch.device(device).type, 2**28)
    batch = max(1, most // (12 * frames * height * width))
    start, done = time.perf_counter(), 0
    while not done or (
        done < limit.clips and time.perf_counter() - start < limit.seconds and not stopping()
    ):
        count = min(batch, limit.clips - done)
        video, _, specs = generator.batch(count, seed)
        yield video, specs
        done, seed = done + count, seed + 1


@torch.no_grad()
def _coded(coder: WholeClip, video: Tensor) -> Tensor:
    batch = max(1, _CODED_BYTES // (12 * video[0].numel()))
    parts = []
    with torch.autocast("cuda", torch.bfloat16, enabled=video.is_cuda):
        for part in video.split(batch):
            mean = coder.encode(part).chunk(2, dim=1)[0]
            parts.append(coder.decode(mean).float().clamp(-1, 1))
    return torch.cat(parts)


def augment(clips: Tensor) -> Tensor:
    """Small changes that leave every answer true: a shift of up to 4 pixels and 8 % of scale
    (the same in all frames), contrast, brightness, blur for half of the clips, and noise.

    clips: float32 `[B, 3, T, H, W]` in [-1, 1]; hue stays, for it is an answer. No mirror either.
    """
    count, device = len(clips), clips.device
    moved = _moved(clips)
    contrast = 1 + 0.12 * _plus_minus(count, device)
    brightness = 0.06 * _plus_minus(count, device)
    soft = _softened(moved)
    blurred = (torch.rand(count, 1, 1, 1, 1, device=device) < 0.5).float()
    mixed = torch.lerp(moved, soft, blurred * torch.rand(count, 1, 1, 1, 1, device=device))
    noise = 0.04 * torch.rand(count, 1, 1, 1, 1, device=device) * torch.randn_like(mixed)
    return (mixed * contrast + brightness + noise).clamp(-1, 1)


def _plus_minus(count: int, device: torch.device) -> Tensor:
    return 2 * torch.rand(count, 1, 1, 1, 1, device=device) - 1


def _moved(clips: Tensor) -> Tensor:
    count, _, _, height, width = clips.shape
    grid = torch.zeros(count, 2, 3, device=clips.device)
    scale = 1 + 0.08 * (2 * torch.rand(count, device=clips.device) - 1)
    grid[:, 0, 0] = grid[:, 1, 1] = scale
    shift = 2 * torch.rand(count, 2, device=clips.device) - 1
    grid[:, :, 2] = shift * torch.tensor([8 / width, 8 / height], device=clips.device)
    flat = clips.flatten(1, 2)
    where = F.affine_grid(grid, list(flat.shape), align_corners=False)
    moved = F.grid_sample(flat, where, padding_mode="reflection", align_corners=False)
    return moved.view_as(clips)


def _softened(clips: Tensor) -> Tensor:
    flat = clips.flatten(1, 2)
    half = F.avg_pool2d(flat, 2)
    large = F.interpolate(half, flat.shape[-2:], mode="bilinear", align_corners=False)
    return large.view_as(clips)
