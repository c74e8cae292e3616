"""Inputs and helpers that the two files of AdaSpa's tests share."""

import torch

from vdit_sparse.grid import Grid
from vdit_sparse.method import Call
from vdit_sparse.methods.adaspa import AdaSpaAttention

VIDEO = Grid(10, 8, 16)  # 20 blocks of 64
TEXT = Grid(9, 9, 13, 17)  # 1053 video tokens: block 16 of 17 holds their end and the text
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
# Shows the searched mask in the first call already, at each head the same density.
PLAIN = AdaSpaAttention(dense_steps=0, dense_search=False, head_adaptive=False)


def call_at(grid=VIDEO, step=0, memory=None, layer=0):
    memory = {} if memory is None else memory
    return Call(grid, layer=layer, layers=4, step=step, steps=50, memory=memory)


def inputs(grid, device, batch=2):
    return torch.randn(3, batch, 2, grid.tokens, 16, device=device)


def planted(targets, strength, device):
    """q and k `[1, 1, nb * 64, 32]` of which query block p looks at the key blocks targets[p]."""
    codes = torch.eye(32, device=device)[: len(targets)]
    looks = torch.stack([codes[list(blocks)].sum(0) for blocks in targets]) * strength * 32**0.5
    return tuple(x.repeat_interleave(64, 0)[None, None] for x in (looks, codes))


def sharp_and_diffuse(device, sharp, heads=6):
    """Heads `sharp` look at one block each; of the others a later one is the less diffuse."""
    q, k = (x.repeat(1, heads, 1, 1) for x in planted([(p,) for p in range(20)], 20.0, device))
    noise = torch.randn_like(q[:, 0])
    for head in set(range(heads)) - set(sharp):
        q[:, head] = noise * 0.1 * (head + 1)
    return q, k


def same(a, b):
    return torch.equal(a.mask.keep(), b.mask.keep())
