"""Token orders: bijections of the video, text last, regions as blocks."""

import itertools

import pytest
import torch

from vdit_sparse.grid import Grid
from vdit_sparse.orders import (
    AXES,
    axis_order,
    by_video_block,
    region_order,
    text_blocks,
    video_blocks,
)

CPU = torch.device("cpu")
GRID = Grid(3, 5, 7, 4)


@pytest.mark.parametrize("axes", AXES)
def test_axis_order_puts_tokens_where_transposing_does(axes):
    order = axis_order(GRID, axes, CPU)
    tokens = torch.arange(GRID.video).view(3, 5, 7)
    sizes = dict(zip("FHW", (3, 5, 7), strict=True))
    for new, old in enumerate(order[: GRID.video].tolist()):
        place = torch.unravel_index(torch.tensor(new), [sizes[axis] for axis in axes])
        index = [int(place[axes.index(axis)]) for axis in "FHW"]
        assert int(tokens[tuple(index)]) == old
    assert order[GRID.video :].tolist() == list(range(GRID.video, GRID.tokens))


def test_raster_order_is_the_identity_and_unknown_axes_raise():
    assert torch.equal(axis_order(GRID, "FHW", CPU), torch.arange(GRID.tokens))
    with pytest.raises(ValueError, match="axes must be one of .* got 'XYZ'"):
        axis_order(GRID, "XYZ", CPU)


@pytest.mark.parametrize("region", [(8, 16), (16, 8), (8, 8), (4, 16)])
@pytest.mark.parametrize("grid", [GRID, Grid(2, 16, 32), Grid(2, 17, 33, 100), Grid(1, 3, 2)])
def test_whole_regions_are_blocks_and_the_rest_follows(grid, region):
    height, width = region
    rows, columns = -(-grid.height // height), -(-grid.width // width)
    whole, rest = [], []
    for f, i, j in itertools.product(range(grid.frames), range(rows), range(columns)):
        tokens = [
            f * grid.frame_tokens + y * grid.width + x
            for y in range(i * height, min((i + 1) * height, grid.height))
            for x in range(j * width, min((j + 1) * width, grid.width))
        ]
        (whole if len(tokens) == height * width else rest).extend(tokens)
    text = list(range(grid.video, grid.tokens))
    assert region_order(grid, region, CPU).tolist() == whole + rest + text


@pytest.mark.parametrize("text, counts", [(0, [64, 64, 64, 9]), (1, [64, 64, 64])])
def test_values_by_the_blocks_that_hold_video_alone(text, counts):
    grid = Grid(3, 67, 1, text)
    assert video_blocks(grid, 64) == len(counts)
    blocks = by_video_block(torch.arange(grid.video), grid, 64)
    for number, (block, count) in enumerate(zip(blocks, counts, strict=True)):
        assert block[:count].tolist() == list(range(64 * number, 64 * number + count))
        assert (block[count:] == grid.video - 1).all()


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("text", [0, 1, 17, 64, 300])
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 8, 8), (3, 9, 13)])
def test_text_blocks_are_those_that_hold_text(size, text, block):
    grid = Grid(*size, text)
    is_text = torch.arange(grid.tokens) >= grid.video
    holds = torch.tensor([bool(part.any()) for part in is_text.split(block)])
    assert torch.equal(text_blocks(grid, block), holds[:, None] | holds)
