"""DraftAttention: attention between pooled regions of the frames chooses the blocks."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from vdit_sparse.grid import Grid
from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.pool import pool_blocks
from vdit_sparse.kernels.select import threshold_blocks, top_blocks
from vdit_sparse.method import Call, Plan, SparseAttention, check_choice, check_number
from vdit_sparse.orders import by_video_block, region_order, text_blocks, video_blocks


@dataclass(frozen=True, kw_only=True)
class DraftAttention(SparseAttention):
    """Attention between the mean q and k of rectangular regions of each frame ranks all pairs of
    regions of a head, and the best pairs are computed.

    Source: DraftAttention, arXiv 2505.14708, and the authors' released code. In every call:

    1. A region is `pool` = height x width tokens of one frame, as many as a block holds. Tokens are
       reordered so that each region is one block; what is left at the frames' edges fills blocks
       of its own.
    2. q and k are averaged over each region; with g regions the draft map is the softmax over the
       regions of mean q . mean k / sqrt(head size), `[g, g]` for each head. A logit of it is
       exactly the mean of the block's own logits.
    3. The best pairs of the whole map are kept, for each head and batch row alone: rows of the map
       keep unequal numbers. Blocks of text are kept whole, as rows and as columns.

    density: kept share of pairs of video regions, above 0 and at most 1, before what the other
        fields add; 1 minus the paper's sparsity (released: 0.25 for Wan 2.1, 0.1 for HunyuanVideo).
    pool: (height, width) of a region in tokens, of which the product is `block`. None is (8, 16)
        for blocks of 128, but (16, 8) where a frame's height is at least its width (from
        LightX2V), and (8, 8) for blocks of 64.
    select: "exact" (ours, as in the authors' later Anemoi) keeps max(1, ceil(density g^2)) pairs,
        equal ones in row-major order. "released" keeps all pairs not below the k-th smallest,
        k = int((1 - density) g^2), or all pairs if k is 0.
    force_diagonal: a region always sees itself (ours). Without it, rows of the map may be left
        without a video key, as in the released code; where no other key is certain either, each
        row keeps at least its best region.
    sink_frames: leading frames kept as keys; 0 in the paper, 1 in LightX2V.
    intra_frame: a region always sees its own frame; False in the paper, True in LightX2V.
    dense_steps: the paper's first 25 %. The released code has timestep thresholds instead, 27 to
        30 % of the steps at its settings, and runs layer 0 (Wan) or 0 and 1 (HunyuanVideo) dense:
        `dense_layers` is 0 here, as the paper names none.

    Where we differ: the map is fp32 and ranked by its logarithm, for bf16 probabilities tie and
    underflow (the released map is bf16, the theorem of the paper is about logits, whose ranking is
    another). Any grid works: tokens of regions that reach over the frame's edge are packed into
    blocks, so that none has masked slots (`orders.region_order`). Each batch row has its own map,
    as in the released variant for guidance; the other takes the first row's. Raises ValueError for
    a field out of range.
    """

    density: float = 0.25
    pool: tuple[int, int] | None = None
    select: str = "exact"
    force_diagonal: bool = True
    sink_frames: int = 0
    intra_frame: bool = False
    dense_steps: int | float = 0.25

    def __post_init__(self):
        super().__post_init__()
        check_number("density", self.density, 0, 1)
        check_choice("select", self.select, ("exact", "released"))
        for name in ("force_diagonal", "intra_frame"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        if type(self.sink_frames) is not int or self.sink_frames < 0:
            raise ValueError(
                f"sink_frames must be an integer of at least 0, got {self.sink_frames!r}."
            )
        if isinstance(self.pool, list):
            object.__setattr__(self, "pool", tuple(self.pool))
        if self.pool is not None and not _is_region(self.pool, self.block):
            raise ValueError(
                f"pool must be None or the (height, width) of a region of block = {self.block} "
                f"tokens, height * width = {self.block}, got {self.pool!r}."
            )

    def region(self, grid: Grid) -> tuple[int, int]:
        """(height, width) of a region in tokens on this grid."""
        if self.pool is not None:
            return self.pool
        if self.block == 64:
            return (8, 8)
        return (16, 8) if grid.height >= grid.width else (8, 16)

    def draft_map(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        """Logarithm of the draft map for q, k `[B, H, S, D]`: fp32 `[B, H, g, g]`, the blocks of
        queries and keys that hold video alone, in the order of `orders.region_order`."""
        count = video_blocks(grid, self.block)
        if count == 0:
            return q.new_empty(*q.shape[:2], 0, 0, dtype=torch.float32)
        order = region_order(grid, self.region(grid), q.device)
        video = order[: min(count * self.block, grid.video)]
        q, k = (pool_blocks(x, self.block, order=video) for x in (q, k))
        logits = (q * q.shape[-1] ** -0.5) @ k.mT
        return logits.sub_(logits.logsumexp(-1, keepdim=True))

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        """The plan for q, k `[B, H, S, D]`: a mask per batch row and head, one order for all."""
        grid = call.grid
        order = region_order(grid, self.region(grid), q.device)
        score = self.draft_map(q, k, grid)
        always = _always(self, grid, q.device)
        if not (self.force_diagonal or self.intra_frame or self.sink_frames or grid.text):
            # A row that has any pair has its best, so this adds to empty rows only.
            best = score.argmax(-1, keepdim=True)
            always = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, best, True)
        return Plan(self._select(score, always), order)

    def _select(self, score: Tensor, always: Tensor) -> BlockMask:
        """The mask of the video's draft map `[B, H, g, g]` and of `always`, over all blocks."""
        pairs = score.shape[-1] ** 2
        text = always.shape[-1] - score.shape[-1]
        # Pairs with text are kept by `always` and are last to be chosen here.
        candidates = pad(score, (0, text, 0, text), value=-torch.inf) if text else score
        kept = {"block": self.block, "always": always}
        if self.select == "exact":
            # 0.07 * 100 is above 7 in floating point.
            count = max(1, math.ceil(round(self.density * pairs, 6)))
            return top_blocks(candidates, count, per="head", **kept)
        kth = int((1 - self.density) * pairs)
        lowest = score.flatten(2).kthvalue(kth).values if kth else -torch.inf
        return threshold_blocks(candidates, lowest, **kept)


def _is_region(pool: object, block: int) -> bool:
    pair = isinstance(pool, tuple) and [type(size) for size in pool] == [int, int]
    return pair and min(pool) >= 1 and math.prod(pool) == block


@lru_cache(maxsize=8)
def _always(method: DraftAttention, grid: Grid, device: torch.device) -> Tensor:
    """The blocks kept whatever the map says, bool `[nb, nb]` (query block, key block)."""
    # A cached tensor outlives the inference mode that it may have been asked for in.
    with torch.inference_mode(False):
        order = region_order(grid, method.region(grid), torch.device("cpu"))
        frames = by_video_block(order // grid.frame_tokens, grid, method.block)
        first, last = frames.aminmax(dim=1)
        always, count = text_blocks(grid, method.block), len(first)
        video = always[:count, :count]
        always[:, :count] |= first < method.sink_frames
        if method.force_diagonal:
            video |= torch.eye(count, dtype=torch.bool)
        if method.intra_frame:
            video |= (first[:, None] <= last) & (first <= last[:, None])
        return always.to(device)
