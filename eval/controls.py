"""What a method must beat, and what it cannot: random blocks and the blocks of largest exact mass.

Both keep the same number of blocks as the method that they are compared with. They are no methods
(not in `METHODS`): the oracle needs a dense pass and a second one for each plan.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from vdit_sparse.call import Call
from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.block_mass import block_mass
from vdit_sparse.kernels.block_sparse import block_sparse_attention
from vdit_sparse.kernels.select import top_blocks
from vdit_sparse.method import Plan, SparseAttention, check_number
from vdit_sparse.orders import text_blocks


@dataclass(frozen=True, kw_only=True)
class Control(SparseAttention):
    """`density` of the key blocks in each row (at least one), text kept beside them."""

    density: float = 0.25

    def __post_init__(self):
        super().__post_init__()
        check_number("density", self.density, 0, 1)

    @abstractmethod
    def score(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        """Which blocks to prefer, fp32 `[B|1, H|1, nb, nb]`."""

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        nb = -(-call.grid.tokens // self.block)
        count = counts(nb, self.density, q.device)
        always = text_blocks(call.grid, self.block).to(q.device) if call.grid.text else None
        return Plan(top_blocks(self.score(q, k, call), count, self.block, always=always))


@dataclass(frozen=True, kw_only=True)
class RandomBlocks(Control):
    """Other blocks in each head, layer, batch row and step; the same ones for the same seed."""

    seed: int = 0

    def score(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        nb = -(-call.grid.tokens // self.block)
        place = (self.seed * 1009 + call.step) * 1009 + call.layer
        generator = torch.Generator(q.device).manual_seed(place)
        return torch.rand(*q.shape[:2], nb, nb, device=q.device, generator=generator)


@dataclass(frozen=True, kw_only=True)
class OracleBlocks(Control):
    """The blocks on which each query block puts the largest exact attention mass: the ceiling of
    what choosing blocks of the raster order by row can reach."""

    def score(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        call.note.searched = True
        everything = BlockMask.full(call.grid.tokens, block=self.block, device=q.device)
        how = {"kv_len": call.kv_len, "backend": self.backend}
        _, lse = block_sparse_attention(q, k, k, everything, **how)
        return block_mass(q, k, lse, self.block)


def counts(nb: int, density: float, device: torch.device) -> Tensor:
    """Kept blocks of each of `nb` rows, int64 `[1, 1, nb]`: at least 1, `density * nb` on average,
    the fractions spread over the rows."""
    ends = (torch.arange(nb + 1, device=device, dtype=torch.float64) * density * nb).round()
    return ends.diff().long().clamp(1, nb)[None, None]
