"""Spatial bands that repeat over all frame pairs: as tokens, as blocks of the sequence, as tiles.

The width of a band is a kept share of the tokens of a frame: a token sees those tokens of every
frame that lie near its own place. Text sees all and is seen by all.
"""

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from vdit_sparse.grid import Grid
from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.method import Plan
from vdit_sparse.orders import by_video_block, region_order, text_blocks, video_blocks

MASKS = ("block", "token", "tile")
# Height and width in tokens of a tile, by block; DraftAttention's where a block has 128.
REGIONS = {64: (8, 8), 128: (8, 16)}

# Rows of interval pairs tested at once: bounds the memory of a build to tens of megabytes.
PAIR_ROWS = 256
# Bytes of fp32 scores that `band_attention` holds at once.
SCORE_BYTES = 64 * 2**20


@lru_cache(maxsize=8)
def band_plan(grid: Grid, mask: str, share: float, block: int, device: torch.device) -> Plan:
    """The band as a plan: "block" rounded to blocks of the sequence, "token" the blocks of the
    sequence that cover it, "tile" a disc of tiles in the order of `orders.region_order`."""
    # A cached tensor outlives the inference mode that it may have been asked for in.
    with torch.inference_mode(False):
        if mask == "tile":
            keep = band_tiles(grid, share, REGIONS[block])
            order = region_order(grid, REGIONS[block], device)
            return Plan(BlockMask.from_keep(keep, block).to(device), order)
        keep = band_blocks(grid, half_width(grid, share), block, cover=mask == "token")
        return Plan(BlockMask.from_keep(keep, block).to(device))


def half_width(grid: Grid, share: float) -> int:
    """How many tokens of a frame the band reaches to either side: floor(w / 2) with
    w = floor(share * frame tokens). A share of 1 reaches everything, and not just half a frame."""
    tokens = grid.frame_tokens
    return tokens - 1 if share == 1 else int(tokens * share) // 2


def band_density(grid: Grid, half: int) -> float:
    """Kept share of the token pairs of the whole sequence, text included, 0 to 1."""
    tokens, total = grid.frame_tokens, grid.tokens**2
    half = min(half, tokens - 1)
    pairs = tokens * (2 * half + 1) - half * (half + 1)
    return (grid.frames**2 * pairs + total - grid.video**2) / total


def band_blocks(grid: Grid, half: int, block: int, *, cover: bool = False) -> Tensor:
    """The band in blocks of the sequence, bool `[nb, nb]` (query block, key block) on the CPU.

    A block may hold parts of several frames; a pair of blocks is kept if any pair of their parts
    is. cover=True keeps every pair of parts with a token pair of the band, which at narrow bands is
    several times the band. Otherwise the band is rounded: parts are kept whose centres are at most
    max(half, block / 2) tokens apart, which keeps its share where it is wider than a block, and at
    least the block at a query block's own place in every frame. Blocks that hold text are whole.
    """
    tokens, blocks = grid.frame_tokens, math.ceil(grid.tokens / block)
    keep = torch.zeros(blocks, blocks, dtype=torch.bool, device="cpu")
    starts = torch.cat(
        [torch.arange(0, grid.video, step, device="cpu") for step in (block, tokens)]
    ).unique()
    first, home = starts % tokens, starts // block
    last = first + torch.diff(starts, append=starts.new_tensor([grid.video])) - 1
    for rows in torch.arange(len(starts), device="cpu").split(PAIR_ROWS):
        if cover:
            gap = torch.maximum(first[rows, None] - last, first - last[rows, None])
            near = gap <= half
        else:
            twice = (first + last)[rows, None] - (first + last)
            near = twice.abs() <= max(2 * half, block)
        query, key = near.nonzero(as_tuple=True)
        keep[home[rows][query], home[key]] = True
    return keep | text_blocks(grid, block)


def band_tiles(grid: Grid, share: float, region: tuple[int, int]) -> Tensor:
    """The band as a disc of tiles, bool `[nb, nb]` on the CPU, tiles being the blocks that
    `orders.region_order` has: pairs are kept whose centres lie at most a radius apart, and the
    nearest tile of each frame. Of the distances that there are, the radius is the one with which
    the kept share of the pairs, discs cut off at the edges of the frame, comes nearest to `share`.
    Blocks of text are whole."""
    block = region[0] * region[1]
    keep = text_blocks(grid, block)
    if not video_blocks(grid, block):
        return keep
    order = by_video_block(region_order(grid, region, torch.device("cpu")), grid, block)
    place, home = order % grid.frame_tokens, order[:, 0] // grid.frame_tokens
    y, x = (each.double().mean(1) for each in (place // grid.width, place % grid.width))
    apart = (y[:, None] - y).square() + (x[:, None] - x).square()
    radii, pairs = apart.unique(return_counts=True)
    nearest = (pairs.cumsum(0) / apart.numel() - share).abs().argmin()
    keep[: len(y), : len(y)] |= apart <= radii[nearest]
    for frame in home.unique():
        away = apart.masked_fill(home != frame, torch.inf)
        keep[torch.arange(len(y), device="cpu"), away.argmin(1)] = True
    return keep | keep.mT


def band_attention(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, half: int, kv_len: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of exactly the tokens in the band: out `[B, H, S, D]` in the dtype of q, and lse
    `[B, H, S]` fp32, natural log, of q, k, v `[B, H, S, D]` in the order of the sequence.
    kv_len: int32 `[B]`, keys from there on are masked in that batch row.

    Plain torch in fp32, on any device, in chunks of places of a frame whose scores take about
    `SCORE_BYTES`; never `[S, S]`. Slow: it is there to compare with results of token masks.
    """
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    hidden = None
    if kv_len is not None:
        hidden = (torch.arange(grid.tokens, device=q.device) >= kv_len[:, None])[:, None, None]
        v = v.masked_fill(hidden.mT, 0)  # a weight of 0 times nan is nan
    place = torch.arange(grid.frame_tokens, device=q.device)
    video, text = torch.arange(grid.tokens, device=q.device).split([grid.video, grid.text])
    video = video.view(grid.frames, -1)
    budget = SCORE_BYTES // (4 * q.shape[0] * q.shape[1])
    for first, last in _chunks(grid, half, budget):
        low, high = max(first - half, 0), last + half
        rows, columns = video[:, first:last].flatten(), video[:, low:high].flatten()
        near = (place[first:last, None] - place[low:high]).abs() <= half
        visible = near.repeat(grid.frames, grid.frames)
        visible = pad(visible, (0, grid.text), value=True)
        _attend_rows((q, k, v), (out, lse), rows, torch.cat([columns, text]), visible, hidden)
    if grid.text:
        for rows in text.split(max(1, budget // grid.tokens)):
            _attend_rows((q, k, v), (out, lse), rows, slice(None), None, hidden)
    return out, lse


def _chunks(grid: Grid, half: int, budget: int) -> Iterator[tuple[int, int]]:
    """Ranges of places of a frame, so many that at most about `budget` scores are held at once."""
    side = max(2 * half, 64)
    keys = grid.frames * (2 * half + side) + grid.text
    count = max(1, min(side, budget // (grid.frames * keys)))
    for first in range(0, grid.frame_tokens, count):
        yield first, min(first + count, grid.frame_tokens)


def _attend_rows(inputs, results, rows: Tensor, columns: Tensor | slice, visible, hidden) -> None:
    """Attention of the positions `rows` to those in `columns`, into `results`."""
    q, k, v = (
        x[:, :, part].float() for x, part in zip(inputs, (rows, columns, columns), strict=True)
    )
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if visible is not None:
        scores.masked_fill_(~visible, -torch.inf)
    if hidden is not None:
        scores.masked_fill_(hidden[..., columns], -torch.inf)
    out, lse = results
    out[:, :, rows] = (scores.softmax(-1) @ v).to(out.dtype)
    lse[:, :, rows] = scores.logsumexp(-1)
