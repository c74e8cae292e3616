"""Grids and helpers that the two files of DraftAttention's tests share."""

import math

import torch

from vdit_sparse.call import Call
from vdit_sparse.grid import Grid
from vdit_sparse.methods.draft import DraftAttention

# Images, one token, ragged regions in both directions, text that fills no block.
GRIDS = [
    Grid(1, 1, 1),
    Grid(1, 9, 13),
    Grid(3, 20, 9),
    Grid(5, 9, 19, 17),
    Grid(2, 16, 32, 130),
    Grid(4, 16, 32),
]
# 16 and 12 whole regions, for patterns and counts.
WHOLE, TEXT = Grid(4, 16, 32), Grid(3, 16, 32, 70)
BARE = {"force_diagonal": False}


def call_at(grid, step=1):
    return Call(grid, layer=0, layers=1, step=step, steps=4, memory={})


def region_of_tokens(method, grid):
    """The region of each token, and -1 for text, worked out token by token."""
    height, width = method.region(grid)
    rows, columns = math.ceil(grid.height / height), math.ceil(grid.width / width)
    token = torch.arange(grid.video)
    frame, place = token // grid.frame_tokens, token % grid.frame_tokens
    row, column = place // grid.width // height, place % grid.width // width
    region = (frame * rows + row) * columns + column
    return torch.cat([region, torch.full((grid.text,), -1)])


def exact_map(method, q, k, grid):
    """The logarithm of the draft map in fp64."""
    home = region_of_tokens(method, grid)
    means = [
        torch.stack([x.double()[:, :, home == r].mean(2) for r in range(int(home.max()) + 1)], 2)
        for x in (q.cpu(), k.cpu())
    ]
    return (means[0] @ means[1].mT / q.shape[-1] ** 0.5).log_softmax(-1)


def video_part(method, q, k, grid):
    """The kept pairs of video regions, bool `[B, H, g, g]`."""
    keep = method.plan(q, k, call_at(grid)).mask.keep().cpu()
    g = int(region_of_tokens(method, grid).max()) + 1
    return keep[:, :, :g, :g]


def inputs(grid, device, batch=2, heads=2, size=16):
    return torch.randn(3, batch, heads, grid.tokens, size, device=device)


def planted(grid, device, size=16):
    """q, k that are constant in each region."""
    home = region_of_tokens(DraftAttention(), grid)
    q, k = torch.randn(2, 2, 2, int(home.max()) + 1, size)[:, :, :, home]
    return (3 * q).to(device), (3 * k).to(device)
