"""Radial Attention: one static mask whose band halves each time the frame distance doubles."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vdit_sparse.grid import Grid
from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.method import Call, Plan, SparseAttention
from vdit_sparse.orders import text_blocks

# Tokens; the released code has this number for blocks of 64 too.
DECIMATION_UNIT = 128
# Rows of interval pairs tested at once: bounds the memory of a build to tens of megabytes.
PAIR_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class RadialAttention(SparseAttention):
    """Static attention in which a token sees nearby frames whole and far ones through a band that
    halves with every doubling of the frame distance d, so that the cost is O(F log F) in frames.

    Source: Radial Attention, arXiv 2506.19852. Implemented is the rule of the authors' released
    code and not the paper's Eq. 4: only the former reproduces the paper's own sparsities. With S
    tokens a frame and P = 2^floor(log2 S), a query and a key d frames and x tokens of a frame
    apart see each other if

    - the key lies in the first `sink_frames` frames, or d = 0, or d = 1 (see `d1`), or
    - x <= max(block, decay * P / 2^floor(log2 d)), and d is a multiple of
      128 * 2^floor(log2 d) / P where that is above 1 (the frame decimation).

    decay: scales the band for d >= 2, above 0. At block 128 and P = 2048 (720p) every decay up to
        0.228 gives the same mask, for the band is then as thin as a block can be: about 468 / P.
    d1: "full" keeps neighbouring frames whole; "half" keeps x <= S // 2 (with "straddle" at least
        `block`), as the released code did for Wan in every commit before 72788d4 (2025-11-11). For
        HunyuanVideo it was always "full".
    sink_frames: leading frames kept as keys (not as queries); 1 in the paper and for Wan, 0 in the
        released code for HunyuanVideo.
    align: what to do with blocks that straddle two frames, where S is no multiple of `block`.
        "straddle" (ours) keeps a block pair if any pair of its per-frame intervals passes.
        "released" repeats the released code, which loses coverage at the first and last rows of
        each frame (users see glitches there); it is for comparison. Equal where S is a multiple.
    decimate: whether the frame decimation applies.

    Text blocks, and the block that holds the end of the video and the start of the text, are kept
    whole as rows and as columns. All heads, layers and steps share the mask. Any grid works.
    Raises ValueError for a field out of range.
    """

    decay: float = 0.2
    d1: str = "full"
    sink_frames: int = 1
    align: str = "straddle"
    decimate: bool = True

    def __post_init__(self):
        super().__post_init__()
        if type(self.decay) not in (int, float) or not 0 < self.decay < math.inf:
            raise ValueError(f"decay must be a finite number above 0, got {self.decay!r}.")
        if type(self.sink_frames) is not int or self.sink_frames < 0:
            raise ValueError(
                f"sink_frames must be an integer of at least 0, got {self.sink_frames!r}."
            )
        for name, choices in (("d1", ("full", "half")), ("align", ("straddle", "released"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}.")
        if not isinstance(self.decimate, bool):
            raise ValueError(f"decimate must be True or False, got {self.decimate!r}.")

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        """The plan of this geometry; q and k only say on which device."""
        return _plan_on(self, call.grid, q.device)

    def keep(self, grid: Grid) -> Tensor:
        """The kept blocks, bool `[nb, nb]` (query block, key block) on the CPU."""
        blocks = math.ceil(grid.tokens / self.block)
        keep = torch.zeros(blocks, blocks, dtype=torch.bool, device="cpu")
        video = math.ceil(grid.video / self.block)
        mark = _mark_straddle if self.align == "straddle" else _mark_released
        mark(keep[:video, :video], self, grid)
        keep |= text_blocks(grid, self.block)
        # Only the released rule can leave a row without keys.
        return keep | torch.diag(~keep.any(-1))


@lru_cache(maxsize=8)
def _plan_on(method: RadialAttention, grid: Grid, device: torch.device) -> Plan:
    mask = _mask(method, grid)
    with torch.inference_mode(False):
        return Plan(mask.to(device))


@lru_cache(maxsize=8)
def _mask(method: RadialAttention, grid: Grid) -> BlockMask:
    # A cached tensor outlives the inference mode that it may have been asked for in.
    with torch.inference_mode(False):
        return BlockMask.from_keep(method.keep(grid), method.block)


def _band(method: RadialAttention, tokens: int, distance: int) -> int | None:
    """Half-width in tokens of the band between frames of `tokens` tokens that lie `distance`
    frames apart, or None if decimation drops the pair. `tokens + block` or more keeps all."""
    everything = tokens + method.block
    if distance == 0 or (distance == 1 and method.d1 == "full"):
        return everything
    if distance == 1:
        return tokens // 2
    power = 2 ** (tokens.bit_length() - 1)
    octave = 2 ** (distance.bit_length() - 1)
    if method.decimate and distance % max(DECIMATION_UNIT * octave // power, 1):
        return None
    return int(min(max(method.block, method.decay * power / octave), everything))


def _mark_straddle(keep: Tensor, method: RadialAttention, grid: Grid) -> None:
    """Marks the video's block pairs of which any pair of per-frame intervals passes.

    Where S is a multiple of `block`, an interval is a block, and block pairs at spatial distance
    delta pass if delta * block - band <= ceil(block / 6): the exact closed form of the released
    shrink rule. In tokens between the intervals that reads gap <= band - block + 1 +
    ceil(block / 6), which holds for intervals of any length.
    """
    block, tokens = method.block, grid.frame_tokens
    starts = torch.cat(
        [torch.arange(0, grid.video, step, device="cpu") for step in (block, tokens)]
    ).unique()
    lengths = torch.diff(starts, append=starts.new_tensor([grid.video]))
    frame, first, home = starts // tokens, starts % tokens, starts // block
    last = first + lengths - 1
    bands = [_band(method, tokens, distance) for distance in range(grid.frames)]
    slack = 1 - block + math.ceil(block / 6)
    reach = [-1 if band is None else max(band, block) + slack for band in bands]
    frame, first, last, reach = (
        torch.as_tensor(x, dtype=torch.int32, device="cpu") for x in (frame, first, last, reach)
    )
    sink = frame < method.sink_frames
    for rows in torch.arange(len(starts), device="cpu").split(PAIR_ROWS):
        gap = torch.maximum(first[rows, None] - last, first - last[rows, None]).clamp_(min=0)
        distance = (frame[rows, None] - frame).abs_()
        query, key = ((gap <= reach[distance]) | sink).nonzero(as_tuple=True)
        keep[home[rows][query], home[key]] = True


def _mark_released(keep: Tensor, method: RadialAttention, grid: Grid) -> None:
    """Marks the video's block pairs that the released code keeps.

    Each pair of frames gives a tile of ceil(S / block) blocks a side, which starts at the block
    that holds the frame's first token; what sticks out of a tile's last block is lost. Ours is
    that a video whose end fills no block runs at all: it is masked as if padded, its last block
    kept whole.
    """
    block, tokens = method.block, grid.frame_tokens
    keep[grid.video // block :] = True
    keep[:, grid.video // block :] = True
    side = math.ceil(tokens / block)
    shrink = lru_cache(maxsize=None)(lambda *offsets: _shrink(tokens, block, *offsets))
    for i in range(grid.frames):
        for j in range(grid.frames):
            sink = j < method.sink_frames
            band = _band(method, tokens, 0 if sink else abs(i - j))
            if band is None:
                continue
            (row, row_offset), (column, column_offset) = (
                divmod(frame * tokens, block) for frame in (i, j)
            )
            keep[row : row + side, column : column + side] |= shrink(
                row_offset, column_offset, band
            )


def _shrink(tokens: int, block: int, row_offset: int, column_offset: int, band: int) -> Tensor:
    """Kept blocks of one tile, bool `[side, side]`: those in which more than 0.6 of the covered
    columns have more than a third of their `block` rows in the band."""
    side = math.ceil(tokens / block)
    start = torch.arange(0, side * block, block, device="cpu")[:, None] - row_offset
    first, last = start.clamp(min=0), (start + block).clamp(max=tokens) - 1
    column = torch.arange(side * block, device="cpu") - column_offset
    rows = torch.minimum(last, column + band) - torch.maximum(first, column - band) + 1
    rows = torch.where((column >= 0) & (column < tokens), rows, 0).view(side, side, block)
    covered, dense = (rows > 0).sum(-1), (3 * rows > block).sum(-1)
    return 5 * dense > 3 * covered
