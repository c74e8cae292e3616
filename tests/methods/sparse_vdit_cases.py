"""Calibrations, calls and planted heads that both files of Sparse-vDiT's tests share."""

import math
from dataclasses import asdict

import torch

from vdit_sparse.calibration import Calibration, save
from vdit_sparse.call import Call, Origin
from vdit_sparse.grid import Grid
from vdit_sparse.methods.sparse_vdit import Patterns, stripe_count

# Frames of two blocks of 64: sixteen blocks in all.
GRID = Grid(8, 8, 16)
ORIGIN = Origin(model="tiny", config="0123", scheduler="Euler")
# Text, images, sizes that no block divides, fewer tokens than a block.
GRIDS = [
    Grid(1, 16, 28),
    Grid(1, 9, 13, 17),
    Grid(9, 9, 13, 17),
    Grid(8, 8, 16, 64),
    Grid(7, 9, 13),
]

SEARCHED = Patterns(block=64)


def call_at(grid=GRID, step=0, steps=4, layer=0, layers=1, memory=None, expert="transformer"):
    origin = Origin(ORIGIN.model, ORIGIN.config, ORIGIN.scheduler, expert)
    memory = {} if memory is None else memory
    return Call(grid, layer, layers, step, steps, memory, origin)


def calibration(path, modes, patterns=SEARCHED, *, grid=GRID, columns=None, expert="transformer"):
    """A file with int8 `modes` `[steps, layers, heads]`; the first blocks are stripes unless given.
    Returns its path."""
    modes = torch.as_tensor(modes, dtype=torch.int8)
    steps, layers, heads = modes.shape
    tensors = {f"{expert}.modes": modes}
    if patterns.stripes == "searched":
        if columns is None:
            columns = torch.arange(stripe_count(grid, patterns)).expand(layers, heads, -1)
        tensors[f"{expert}.stripes"] = columns.to(torch.int32)
    save(written(path, tensors, patterns, grid, layers, steps))
    return str(path)


def written(path, tensors, fields, grid, layers, steps):
    name = "SparseVDiTAttention"
    runs = (("a fox",), (0,), {"torch": torch.__version__})
    return Calibration(str(path), name, asdict(fields), ORIGIN, grid, layers, steps, *runs, tensors)


def on_circle(places, around, width):
    """Two features of which the product falls off with the distance on a circle of `around` places
    as a Gaussian of standard deviation `width`, if the scale is 1."""
    angle = 2 * math.pi * places.double() / around
    sharpness = around / (2 * math.pi * width)
    return sharpness * torch.stack([angle.cos(), angle.sin()], -1).float()


def planted_heads(device):
    """q, k, v `[1, 5, S, 16]` on `GRID`: heads that are local in the order of the sequence, look at
    their place in all frames, at 20 keys, at random keys, and one that adds next to nothing."""
    tokens, places = GRID.tokens, torch.arange(GRID.tokens)
    spots = places % GRID.frame_tokens
    scattered = torch.randperm(tokens)
    few = torch.zeros(tokens, 2)
    few[5 * 64 : 5 * 64 + 20, 0] = 30.0
    keys = [
        on_circle(places, 2 * tokens, 30.0),
        on_circle(spots, 2 * GRID.frame_tokens, 2.0),
        few,
        on_circle(scattered, 2 * tokens, 2.0),
        torch.randn(tokens, 2),
    ]
    queries = [
        keys[0],
        keys[1],
        torch.tensor([[1.0, 0.0]]).expand(tokens, 2),
        on_circle(places, 2 * tokens, 2.0),
        torch.randn(tokens, 2),
    ]
    q, k, v = torch.randn(3, 1, 5, tokens, 16)
    # Scale is 1/4 at a head size of 16.
    q[0, ..., :2], k[0, ..., :2] = 4 * torch.stack(queries), torch.stack(keys)
    q[..., 2:] = 0
    for head in range(5):
        out = torch.nn.functional.scaled_dot_product_attention(q[:, head], k[:, head], v[:, head])
        v[:, head] /= out.square().mean().sqrt()
    v[:, 4] *= 1e-3
    return q.to(device), k.to(device), v.to(device)
