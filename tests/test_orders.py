"""Token orders: bijections of the video, text last, regions as blocks."""

import itertools

import pytest
import torch

from vdit_sparse.grid import Grid
from vdit_sparse.orders import AXES, axis_order, region_order, regions_of, text_blocks

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
def test_regions_are_blocks(grid, region):
    order, valid = region_order(grid, region, CPU)
    block = region[0] * region[1]
    frames, rows, columns = regions_of(grid, region)
    regions = frames * rows * columns
    assert len(order) == regions * block + grid.text
    assert torch.equal(order[order >= 0].sort().values, torch.arange(grid.tokens))
    counts = torch.full((regions + -(-grid.text // block),), block) if valid is None else valid
    for number, (f, i, j) in enumerate(itertools.product(*map(range, (frames, rows, columns)))):
        slots = order[number * block : (number + 1) * block]
        real = [
            f * grid.frame_tokens + y * grid.width + x
            for y in range(i * region[0], min((i + 1) * region[0], grid.height))
            for x in range(j * region[1], min((j + 1) * region[1], grid.width))
        ]
        assert slots[: len(real)].tolist() == real
        assert (slots[len(real) :] == -1).all()
        assert counts[number] == len(real)
    assert order[regions * block :].tolist() == list(range(grid.video, grid.tokens))


def test_whole_regions_need_no_counts():
    assert region_order(Grid(2, 16, 32), (8, 16), CPU)[1] is None
    assert region_order(Grid(2, 16, 30), (8, 16), CPU)[1] is not None


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("text", [0, 1, 17, 64, 300])
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 8, 8), (3, 9, 13)])
def test_text_blocks_are_those_that_hold_text(size, text, block):
    grid = Grid(*size, text)
    is_text = torch.arange(grid.tokens) >= grid.video
    holds = torch.tensor([bool(part.any()) for part in is_text.split(block)])
    assert torch.equal(text_blocks(grid, block), holds[:, None] | holds)
