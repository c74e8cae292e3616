"""Token orders and blocks as pure functions of geometry: axis orders, regions of a frame, text.

An order is int64: new position -> old position (`Plan.order`); text stays last. Orders are cached
on every argument, and outlive an inference mode that they may have been asked for in.
"""

from functools import lru_cache

import torch
from torch import Tensor

from vdit_sparse.grid import Grid

# The order of the axes from slowest to fastest; PAROAttention's six, by its own numbers.
AXES = ("FHW", "FWH", "HWF", "HFW", "WHF", "WFH")


@lru_cache(maxsize=64)
def axis_order(grid: Grid, axes: str, device: torch.device) -> Tensor:
    """`[tokens]`: the video flattened in the order `axes` of frames, height and width, then text.
    "FHW" is the raster order of the sequence itself, "HWF" puts a place's frames side by side."""
    if axes not in AXES:
        raise ValueError(f"axes must be one of {AXES}, got {axes!r}.")
    with torch.inference_mode(False):
        raster = torch.arange(grid.video, device="cpu").view(grid.frames, grid.height, grid.width)
        video = raster.permute(*("FHW".index(axis) for axis in axes)).flatten()
        text = torch.arange(grid.video, grid.tokens, device="cpu")
        return torch.cat([video, text]).to(device)


@lru_cache(maxsize=16)
def region_order(grid: Grid, region: tuple[int, int], device: torch.device) -> Tensor:
    """The tokens by regions of `region` = (height, width) tokens of a frame, int64 `[S]`, as `Plan`
    takes it: first those of whole regions, each in raster order, regions in raster order of (frame,
    row, column); then those of regions that reach over the frame's edge, in the same order; then
    text.

    Whole regions are blocks of height * width tokens; the others fill blocks one after the other,
    so that no slot is masked: a block there holds parts of neighbouring regions.
    """
    height, width = region
    with torch.inference_mode(False):
        token = torch.arange(grid.tokens, device="cpu")
        frame, place = token[: grid.video] // grid.frame_tokens, token[: grid.video]
        y, x = place % grid.frame_tokens // grid.width, place % grid.width
        row, column = y // height, x // width
        over = ((row + 1) * height > grid.height) | ((column + 1) * width > grid.width)
        rows, columns = -(-grid.height // height), -(-grid.width // width)
        number = ((over * grid.frames + frame) * rows + row) * columns + column
        order = number.argsort(stable=True)
        return torch.cat([order, token[grid.video :]]).to(device)


def video_blocks(grid: Grid, block: int) -> int:
    """How many blocks of the sequence hold video alone: all but `text_blocks`."""
    return grid.video // block if grid.text else -(-grid.video // block)


def by_video_block(values: Tensor, grid: Grid, block: int) -> Tensor:
    """Values of the video's tokens, `[>= video]` in the order of the sequence, by their block:
    `[video_blocks, block]`, where the last one fills up what lies past the end."""
    count = video_blocks(grid, block)
    at = torch.arange(count * block, device=values.device).clamp(max=grid.video - 1)
    return values[at].view(count, block)


def text_blocks(grid: Grid, block: int) -> Tensor:
    """The pairs of blocks that every method keeps: those of which one holds text, the block that
    holds the end of the video and the start of the text included. Bool `[nb, nb]` (query block, key
    block) on the CPU, in the order of the sequence; all False without text."""
    at = torch.arange(-(-grid.tokens // block), device="cpu")
    holds = (at >= grid.video // block) & (grid.text > 0)
    return holds[:, None] | holds
