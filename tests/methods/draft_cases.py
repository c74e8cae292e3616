"""Grids and helpers that the two files of DraftAttention's tests share."""

import torch

from vdit_sparse.call import Call
from vdit_sparse.grid import Grid
from vdit_sparse.methods.draft import DraftAttention

# Images, one token, ragged regions in both directions, text that fills no block.
GRIDS = [
    Grid(1, 1, 1),
    Grid(1, 3, 5, 40),
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


def block_of_tokens(method, grid):
    """The block of each token, worked out token by token, and -1 where that holds text."""
    height, width = method.region(grid)
    token = torch.arange(grid.video)
    frame, place = token // grid.frame_tokens, token % grid.frame_tokens
    y, x = place // grid.width, place % grid.width
    row, column = y // height, x // width
    partial = ((row + 1) * height > grid.height) | ((column + 1) * width > grid.width)
    keys = list(zip(*(each.tolist() for each in (partial, frame, row, column, y, x)), strict=True))
    places = {key: number for number, key in enumerate(sorted(keys))}
    blocks = torch.tensor([places[key] // method.block for key in keys])
    if grid.text:
        blocks[blocks >= grid.video // method.block] = -1
    return torch.cat([blocks, torch.full((grid.text,), -1)])


def exact_map(method, q, k, grid):
    """The logarithm of the draft map in fp64."""
    home = block_of_tokens(method, grid)
    if home.max() < 0:
        return torch.empty(*q.shape[:2], 0, 0)
    means = [
        torch.stack([x.double()[:, :, home == r].mean(2) for r in range(int(home.max()) + 1)], 2)
        for x in (q.cpu(), k.cpu())
    ]
    return (means[0] @ means[1].mT / q.shape[-1] ** 0.5).log_softmax(-1)


def video_part(method, q, k, grid):
    """The kept pairs of blocks of video alone, bool `[B, H, g, g]`."""
    keep = method.plan(q, k, call_at(grid)).mask.keep().cpu()
    g = int(block_of_tokens(method, grid).max()) + 1
    return keep[:, :, :g, :g]


def inputs(grid, device, batch=2, heads=2, size=16):
    return torch.randn(3, batch, heads, grid.tokens, size, device=device)


def planted(grid, device, size=16):
    """q, k that are constant in each block."""
    home = block_of_tokens(DraftAttention(), grid)
    q, k = torch.randn(2, 2, 2, int(home.max()) + 1, size)[:, :, :, home]
    return (3 * q).to(device), (3 * k).to(device)
