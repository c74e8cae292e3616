"""Token orders and blocks as pure functions of geometry: axis orders, regions of a frame, text.

An order is int64: new position -> old position (`Plan.order`); text stays last. Orders are cached
on every argument, and outlive an inference mode that they may have been asked for in.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

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
def region_order(
    grid: Grid, region: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Regions of `region` = (height, width) tokens of a frame as blocks of height * width slots.

    Returns order `[S']` and valid `[nk]`, as `Plan` and `BlockMask` take them: regions in raster
    order of (frame, row, column), the real tokens of a region that reaches over the frame's edge
    first and then masked slots (-1); then text, from a block's start. valid is None where no region
    reaches over an edge.
    """
    height, width = region
    block = height * width
    with torch.inference_mode(False):
        raster = torch.arange(grid.video, device="cpu").view(grid.frames, grid.height, grid.width)
        over = (0, -grid.width % width, 0, -grid.height % height)
        tiles = pad(raster, over, value=-1).unflatten(2, (-1, width)).unflatten(1, (-1, height))
        slots = tiles.permute(0, 1, 3, 2, 4).reshape(-1, block)
        # Stable: real tokens keep their raster order within the region.
        slots = slots.gather(1, (slots < 0).to(torch.uint8).argsort(stable=True, dim=1))
        text = torch.arange(grid.video, grid.tokens, device="cpu")
        order = torch.cat([slots.flatten(), text]).to(device)
        if over == (0, 0, 0, 0):
            return order, None
        ends = [min(block, grid.text - start) for start in range(0, grid.text, block)]
        valid = torch.cat([(slots >= 0).sum(1), torch.tensor(ends, dtype=torch.long)])
        return order, valid.to(torch.int32).to(device)


def text_blocks(grid: Grid, block: int) -> Tensor:
    """The pairs of blocks that every method keeps: those of which one holds text, the block that
    holds the end of the video and the start of the text included. Bool `[nb, nb]` (query block, key
    block) on the CPU, in the order of the sequence; all False without text."""
    at = torch.arange(-(-grid.tokens // block), device="cpu")
    holds = (at >= grid.video // block) & (grid.text > 0)
    return holds[:, None] | holds


def regions_of(grid: Grid, region: tuple[int, int]) -> tuple[int, int, int]:
    """(frames, rows, columns) of regions that cover the video."""
    return grid.frames, -(-grid.height // region[0]), -(-grid.width // region[1])
