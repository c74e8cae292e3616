"""Attention maps as tiles: what speaks for an axis order, and which tiles a mask keeps."""

import math

import torch
from torch import Tensor

from vdit_sparse.kernels.select import top_blocks

# Probabilities held at once: bounds a pass over a head's map to 256 MiB.
CHUNK = 1 << 26
# Bit patterns of fp16 numbers of at least 0, in ascending order.
LEVELS = 1 << 15


def tile_statistics(
    q: Tensor, k: Tensor, lse: Tensor, block: int, epsilon: float | None, peaks: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of one head's map exp(D^-0.5 q k^T - lse), over its tiles of `block` x `block`, fp32
    `[tiles, tiles]` each: the sum; the share of entries below `epsilon`, None for None; the
    highest entry, None unless `peaks`.

    q, k: `[tiles * block, D]`; lse: fp32 `[tiles * block]`, of a softmax that may have more keys.
    """
    keys = k.float().T * q.shape[-1] ** -0.5
    rows = max(CHUNK // (block * len(k)), 1) * block
    parts = []
    for q_rows, lse_rows in zip(q.split(rows), lse.split(rows), strict=True):
        p = (q_rows.float() @ keys).sub_(lse_rows[:, None]).exp_()
        p = p.view(-1, block, len(k) // block, block)
        small = None if epsilon is None else (p < epsilon).float().mean((1, 3))
        parts.append((p.sum((1, 3)), small, p.amax((1, 3)) if peaks else None))
    columns = zip(*parts, strict=True)
    return tuple(None if part[0] is None else torch.cat(part) for part in columns)


def empty_share(small: Tensor, sigma: float) -> Tensor:
    """M_sparse of the paper: the share of tiles with at least `sigma` small entries, 0 to 1."""
    return (small >= sigma).float().mean()


def incoherence(mass: Tensor, peak: Tensor, block: int) -> Tensor:
    """M_quant of the paper: the mean over tiles of their highest entry over their mean one, at
    least 1; 1 for a tile of zeros."""
    return torch.where(mass > 0, peak * block * block / mass, 1.0).mean()


def coverage(mass: Tensor) -> Tensor:
    """The share of all mass in the heaviest tenth of the tiles."""
    tenth = math.ceil(mass.numel() / 10)
    return mass.flatten().topk(tenth).values.sum() / mass.sum()


def choose_orders(empty: Tensor, spread: Tensor, alpha: float) -> Tensor:
    """The index of the best order, int64 `[L, H]`, by the share of empty tiles and the incoherence
    `[L, orders, H]`; see `PAROSearch.alpha`. The first of equal ones."""
    shares = [x / x.sum(1, keepdim=True).clamp(min=1e-30) for x in (1 - empty, spread)]
    return (alpha * shares[0] + (1 - alpha) * shares[1]).argmin(1)


def keep_heaviest(maps: list[Tensor], density: float, mode: str, block: int) -> list[Tensor]:
    """The kept tiles, bool like each of `maps`, fp16 `[bins, H, tiles, tiles]` of one layer."""
    heaviest = [x.argmax(-1, keepdim=True) for x in maps]
    if mode == "threshold":
        least = threshold(maps, density)
        return [(x >= least).scatter(-1, i, True) for x, i in zip(maps, heaviest, strict=True)]
    tiles = maps[0].shape[-1]
    count = max(round(density * tiles * tiles), tiles)
    # The heaviest of each row are part of the budget.
    scores = [x.float().scatter(-1, i, math.inf) for x, i in zip(maps, heaviest, strict=True)]
    return [top_blocks(score, count, block, per="head").keep() for score in scores]


def threshold(maps: list[Tensor], density: float) -> Tensor:
    """The fp16 number at which the kept share of all tiles comes closest to `density`, if each row
    keeps its heaviest tile; exact, by counting every fp16 number."""
    values = torch.zeros(LEVELS, dtype=torch.int64)
    tops = torch.zeros_like(values)
    for x in maps:
        values += torch.bincount(x.flatten().view(torch.int16), minlength=LEVELS)
        tops += torch.bincount(x.amax(-1).flatten().view(torch.int16), minlength=LEVELS)
    reaching = values.flip(0).cumsum(0).flip(0)
    rescued = tops.cumsum(0) - tops
    off = (reaching + rescued - density * values.sum()).abs()
    return off.argmin().to(torch.int16).view(torch.float16)
