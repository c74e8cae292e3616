"""AdaSpa: the heaviest blocks of each head, found exactly by a search in a few denoising steps."""

import math
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from vdit_sparse.grid import Grid
from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.block_mass import block_mass
from vdit_sparse.kernels.block_sparse import block_sparse_attention
from vdit_sparse.kernels.select import top_blocks
from vdit_sparse.method import Call, Plan, SparseAttention, check_choice, check_number
from vdit_sparse.orders import text_blocks


@dataclass(frozen=True, kw_only=True)
class AdaSpaAttention(SparseAttention):
    """Keeps the key blocks of highest exact attention mass, searched at a few denoising steps.

    Source: AdaSpa, arXiv 2502.21079. At a search, the steps of `refresh` (10 and 30 of 50 there):

    - the first one runs dense attention, which gives the call's output and the LSE of each row; the
      LSE is kept for later searches, which only score again and then run sparse;
    - the mass of a block pair is W = sum of exp(scale q.k - LSE) over its tokens;
    - a row of query blocks keeps the round(density * nb) of nb key blocks of largest W, text too;
    - recall of a head = kept W / W. In each batch row the n <= H / 2 heads of highest recall get
      half the density, the n of lowest recall 1.5 times it, so that the mean stays.

    density: kept share of key blocks, mean over heads, above 0 and up to 1 (2/3 if head_adaptive).
    per: "row", or "head": as many blocks in all, the largest of the head's whole map (Eq. 14).
    head_adaptive: whether heads get three densities.
    recall_eval: "up": n counts the heads with `recall_threshold` at half the density, the lowest
        are taken at 1.5 times it (FlagScale's port); "base": both at `density` (the paper).
    recall_threshold: above 0, up to 1; 0.9 in the port, 0.8 in the paper.
    cache_lse: False makes each search a first one.
    dense_search: a first search outputs its dense pass, of density 1; False runs the new plan, as
        the port does. With `cache_lse=False, refresh="each"`, True is dense throughout.
    first_frame_sink: keeps the blocks of the first frame whole, as rows and columns (the port).
    random_share: share of all blocks, 0 to below 1 (port 0.01), kept beside; seeded by the layer.

    Text blocks, and the block that holds the end of the video and the start of the text, are kept
    whole. These, sinks and random blocks come on top of `density`; the noted density counts them.

    Ours, where the sources are silent or disagree: steps count from 0; n is cut at H / 2 in the
    paper's rule too; heads compete within a batch row; slots past the end are masked, not scored as
    zeros; a row keeps at least one block ("head": within the map's budget); the dense pass has
    precision "bf16"; `backend` is that of attention alone. ValueError for a field out of range.
    """

    density: float = 0.2
    per: str = "row"
    head_adaptive: bool = True
    recall_eval: str = "up"
    recall_threshold: float = 0.9
    cache_lse: bool = True
    dense_search: bool = True
    first_frame_sink: bool = False
    random_share: float = 0.0
    dense_steps: int | float = 0.2
    refresh: str | int | tuple[int | float, ...] = (0.2, 0.6)
    block: int = 64

    def __post_init__(self):
        super().__post_init__()
        most = 2 / 3 if self.head_adaptive else 1
        check_number("density (up to 2/3 if head_adaptive, else 1)", self.density, 0, most)
        check_number("recall_threshold", self.recall_threshold, 0, 1)
        check_choice("per", self.per, ("row", "head"))
        check_choice("recall_eval", self.recall_eval, ("up", "base"))
        for name in ("head_adaptive", "cache_lse", "dense_search", "first_frame_sink"):
            check_choice(name, getattr(self, name), (True, False))
        if type(self.random_share) not in (int, float) or not 0 <= self.random_share < 1:
            raise ValueError(f"random_share must be from 0 to below 1, got {self.random_share!r}.")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Sparse attention of q, k, v `[B, H, S, D]`; a first search gives its dense output."""
        if not (self.dense_search and self.is_due(call) and "lse" not in call.memory):
            return super().attend(q, k, v, call)
        out, lse = self._dense(q, k, v, call)
        with call.note.planning(q.device):
            self.remember(call, self._search(q, k, lse, call))
        call.note.density = 1.0
        return out

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        """Searches with the run's LSE, or at a first search with that of a dense pass."""
        lse = call.memory.get("lse")
        return self._search(q, k, self._dense(q, k, k, call)[1] if lse is None else lse, call)

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        # Blocks of 128 whatever `block` is: their tiles are the larger ones.
        mask = BlockMask.full(q.shape[2], block=128, device=q.device)
        return block_sparse_attention(q, k, v, mask, kv_len=call.kv_len, backend=self.backend)

    def _search(self, q: Tensor, k: Tensor, lse: Tensor, call: Call) -> Plan:
        call.note.searched = True
        if self.cache_lse and self.refresh != "once":
            call.memory["lse"] = lse
        mass = _mass(q, k, lse, self.block, call.kv_len)
        score = mass
        if self.per == "head":  # each row's heaviest block first, so that no row starves
            score = mass.scatter(-1, mass.argmax(-1, keepdim=True), torch.inf)
        top = partial(top_blocks, score, block=self.block, per=self.per)
        count = self._counts(mass, top, call) if self.head_adaptive else self._count(1, mass)
        always = _sinks(call.grid, self.block, self.first_frame_sink, q.device)
        mask = top(count=count, always=always)
        return Plan(self._add_random(mask, call) if self.random_share else mask)

    def _count(self, level: float, mass: Tensor) -> int:
        """Blocks of a row, or of a head's map, at `level` times the density."""
        row = max(round(level * self.density * mass.shape[3]), 1)
        return row if self.per == "row" else row * mass.shape[2]

    def _counts(self, mass: Tensor, top: partial, call: Call) -> Tensor:
        """Blocks of a row or map of each head, int64 `[B, H]`."""
        few, mean, many = (self._count(level, mass) for level in (0.5, 1, 1.5))
        levels = (few, many) if self.recall_eval == "up" else (mean, mean)
        kept = [mass.masked_fill(~top(count=x).keep(), 0).sum((-2, -1)) for x in levels]
        high, low = call.heads.all(torch.stack(kept) / mass.sum((-2, -1)), 2)
        n = (high >= self.recall_threshold).sum(-1, keepdim=True).clamp(max=high.shape[1] // 2)
        # argsort twice: how many heads come before each.
        sparser = (-high).argsort(dim=-1, stable=True).argsort(-1) < n
        denser = low.masked_fill(sparser, torch.inf).argsort(dim=-1, stable=True).argsort(-1) < n
        return call.heads.own(torch.where(sparser, few, torch.where(denser, many, mean)), 1)

    def _add_random(self, mask: BlockMask, call: Call) -> BlockMask:
        """`mask` and random blocks that it drops; all batch rows draw the same numbers."""
        keep = mask.keep()
        seeded = torch.Generator(keep.device).manual_seed(call.layer)
        shape = (call.heads.total(keep.shape[1]), *keep.shape[2:])
        score = call.heads.own(torch.rand(shape, generator=seeded, device=keep.device), 0)
        score = score.expand(keep.shape).masked_fill(keep, -torch.inf)
        count = round(self.random_share * mask.nq * mask.nk)
        return top_blocks(score, count, self.block, per="head", always=keep)


def _mass(q: Tensor, k: Tensor, lse: Tensor, block: int, kv_len: Tensor | None) -> Tensor:
    """`block_mass` of the real tokens, fp32 `[B, H, nb, nb]`."""
    if kv_len is None:
        return block_mass(q, k, lse, block)
    starts = torch.arange(0, q.shape[2], block, device=q.device)
    valid = (kv_len[:, None] - starts).clamp(0, block).to(torch.int32)
    rows = zip(q.split(1), k.split(1), lse.split(1), valid, strict=True)
    # A kernel takes one `valid` for all rows.
    return torch.cat([block_mass(*row, block, valid=real) for *row, real in rows])


@lru_cache(maxsize=16)
def _sinks(grid: Grid, block: int, first_frame: bool, device: torch.device) -> Tensor | None:
    """The blocks that are kept whatever their mass, bool `[nb, nb]`, or None."""
    # A cached tensor outlives the inference mode that it may have been asked for in.
    with torch.inference_mode(False):
        keep = text_blocks(grid, block)
        if first_frame:
            end = math.ceil(grid.frame_tokens / block)
            keep[:end] = True
            keep[:, :end] = True
        return keep.to(device) if keep.any() else None
