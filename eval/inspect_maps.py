"""What one head of a plan visits, and where the exact attention mass of its tokens is."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vdit_sparse.grid import Grid
from vdit_sparse.kernels.block_mass import block_mass
from vdit_sparse.kernels.reorder import inverse, reorder
from vdit_sparse.method import Plan


@dataclass(frozen=True, eq=False)
class HeadPlan:
    """The part of a plan that is one head's, without the padding at the end of the text.

    keep: bool `[nq, nk]`, the visited blocks in plan order; blocks: tokens of a query and of a key
    block; tokens: how many the sequence has.
    order: int32 `[S']`, plan position -> token, -1 for a masked slot, or None where the head keeps
    the order of the sequence; valid: int32 `[nk]` or None, real tokens of each block. Both as in
    `Plan` and `BlockMask`.
    """

    keep: Tensor
    blocks: tuple[int, int]
    tokens: int
    order: Tensor | None = None
    valid: Tensor | None = None

    @property
    def density(self) -> float:
        """Kept share of key blocks, 0 to 1."""
        return float(self.keep.float().mean())

    def raster_share(self) -> Tensor:
        """The same with the order undone: fp32 `[NQ, NK]` on the CPU, of the token pairs of each
        query and key block of the sequence itself the share that is visited, 0 to 1."""
        if self.order is None:
            return self.keep.float().cpu()
        rows, columns = (self._members(size) for size in self.blocks)
        pairs = rows.sum(1, keepdim=True) * columns.sum(1)
        return rows @ self.keep.float().cpu() @ columns.T / pairs

    def visited(self, token: int) -> Tensor:
        """Which tokens the query `token` attends to, bool `[tokens]` on the CPU. Raises ValueError
        for a token that the sequence does not have."""
        _check_token(token, self.tokens)
        keep, places = self.keep.cpu(), self._places()
        return keep[int(places[token]) // self.blocks[0]][places // self.blocks[1]]

    def block_tokens(self, block: int) -> Tensor:
        """The tokens of a key block of the plan, int64 `[n]` on the CPU, in plan order."""
        first = block * self.blocks[1]
        if self.order is None:
            return torch.arange(first, min(first + self.blocks[1], self.tokens), device="cpu")
        slots = self.order[first : first + self.blocks[1]].long().cpu()
        return slots[slots >= 0]

    def to_cpu(self) -> "HeadPlan":
        """The same on the CPU."""
        order, valid = (None if x is None else x.cpu() for x in (self.order, self.valid))
        return replace(self, keep=self.keep.cpu(), order=order, valid=valid)

    def _places(self) -> Tensor:
        """Token -> plan position, int64 `[tokens]` on the CPU."""
        if self.order is None:
            return torch.arange(self.tokens, device="cpu")
        return inverse(self.order.cpu(), self.tokens)

    def _members(self, size: int) -> Tensor:
        """How many tokens of each block of the sequence lie in each block of the plan, fp32."""
        shape = (math.ceil(self.tokens / size), math.ceil(len(self.order) / size))
        homes = torch.arange(self.tokens, device="cpu") // size, self._places() // size
        return torch.zeros(shape).index_put_(homes, torch.ones(()), accumulate=True)


@dataclass(frozen=True, eq=False)
class HeadMap:
    """What a head visits at one call, and its exact attention, on the CPU.

    mass: fp16 `[NQ, NK]`, of the blocks of the sequence itself, the mean over a query block's
    tokens of the softmax weight that a key block has, so that a row sums to 1; ordered: the same,
    `[nq, nk]`, of the blocks of a plan with an order, else None.
    """

    plan: HeadPlan
    mass: Tensor
    ordered: Tensor | None = None

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        parts = (self.plan.keep, self.plan.order, self.plan.valid, self.mass, self.ordered)
        return sum(x.numel() * x.element_size() for x in parts if x is not None)


def head_plan(plan: Plan, row: int, head: int, tokens: int, real: int) -> HeadPlan:
    """The plan of a batch row and head; tokens: of the sequence; real: those before the padding."""
    mask, order = plan.mask, plan.order
    at = tuple(
        slice(None) if x == 1 else slice(n, n + 1)
        for x, n in zip(mask.idx.shape, (row, head), strict=False)
    )
    keep = replace(mask, idx=mask.idx[at], cnt=mask.cnt[at]).keep()[0, 0]
    if order is not None:
        order = (order if order.ndim == 1 else order[head]).to(torch.int32)
    slots = (tokens if order is None else len(order)) - (tokens - real)
    nq, nk = (math.ceil(slots / size) for size in (mask.block_q, mask.block_k))
    valid = mask.valid
    if valid is not None:
        starts = torch.arange(nk, device=valid.device) * mask.block_k
        valid = torch.minimum(valid[:nk], (slots - starts).to(torch.int32))
    order = None if order is None else order[:slots]
    # Where heads have orders of their own, some have that of the sequence.
    if order is not None and torch.equal(order, torch.arange(real, device=order.device).int()):
        order = None
    return HeadPlan(keep[:nq, :nk], (mask.block_q, mask.block_k), real, order, valid)


def plan_mass(q: Tensor, k: Tensor, lse: Tensor, plan: HeadPlan) -> Tensor:
    """Exact mass of the blocks of a plan, fp32 `[nq, nk]`: sums of softmax weights over their
    tokens; q, k `[1, 1, tokens, D]` and lse `[1, 1, tokens]` of dense attention."""
    if plan.order is not None:
        q, k, lse = (reorder(x, plan.order) for x in (q, k, lse))
    return block_mass(q, k, lse, plan.blocks, valid=plan.valid)[0, 0]


def head_map(q: Tensor, k: Tensor, lse: Tensor, plan: HeadPlan, mass: Tensor) -> HeadMap:
    """The map of a head; mass: what `plan_mass` says of the other arguments."""
    ordered = None if plan.order is None else _weights(mass)
    raster = mass if ordered is None else block_mass(q, k, lse, plan.blocks)[0, 0]
    return HeadMap(plan.to_cpu(), _weights(raster), ordered)


def _weights(mass: Tensor) -> Tensor:
    return (mass / mass.sum(1, keepdim=True)).half().cpu()


def recall(mass: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The share of `mass` `[nq, nk]` in the blocks of `keep`, and the most that as many blocks in
    each row could have; 0-dim, 0 to 1. It is the mean over the queries of the softmax weight that
    they are left with."""
    total = mass.sum()
    falling = mass.sort(dim=1, descending=True).values
    ranks = torch.arange(mass.shape[1], device=mass.device)
    best = falling * (ranks < keep.sum(1, keepdim=True))
    return (mass * keep).sum() / total, best.sum() / total


def place_of(grid: Grid, token: int) -> tuple[int, int, int] | None:
    """(frame, row, column) of a token of the sequence, None for text. Raises ValueError for a token
    that the grid does not have."""
    _check_token(token, grid.tokens)
    if token >= grid.video:
        return None
    frame, rest = divmod(token, grid.frame_tokens)
    return (frame, *divmod(rest, grid.width))


def token_at(grid: Grid, frame: int, row: int, column: int) -> int:
    """The token at a place of the video. Raises ValueError for a place outside of it."""
    sizes = (grid.frames, grid.height, grid.width)
    if not all(0 <= x < size for x, size in zip((frame, row, column), sizes, strict=True)):
        raise ValueError(f"There is no place {(frame, row, column)} in {grid}.")
    return (frame * grid.height + row) * grid.width + column


def raster_block(grid: Grid, block: int, size: int) -> range:
    """The tokens of block number `block` of the sequence in its own order, `size` tokens each."""
    if not 0 <= block < math.ceil(grid.tokens / size):
        raise ValueError(f"There is no block {block} of {size} tokens in {grid}.")
    return range(block * size, min((block + 1) * size, grid.tokens))


def _check_token(token: int, tokens: int) -> None:
    if not 0 <= token < tokens:
        raise ValueError(f"The token must be from 0 to {tokens - 1}, got {token}.")
