"""What `vdit-sparse tune` found: for each step, layer and head how much is computed, and how."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vdit_sparse.calibration import CalibratedAttention, Calibration
from vdit_sparse.call import Call
from vdit_sparse.grid import Grid
from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.block_mass import block_mass
from vdit_sparse.kernels.reorder import reorder
from vdit_sparse.kernels.select import top_blocks
from vdit_sparse.method import Plan, execute
from vdit_sparse.orders import AXES, axis_order
from vdit_sparse.tuned_table import NOTHING, Table


@dataclass(frozen=True, kw_only=True)
class TunedAttention(CalibratedAttention):
    """Runs a file of `vdit-sparse tune`: every head has dense steps of its own, and between them
    parts of three methods, in amounts of its own.

    At a dense step of a head all its blocks are computed. Until its next one

    - it keeps the blocks of largest exact mass at that step, as AdaSpa does (arXiv 2502.21079,
      per="head"), `densities[level]` of its map, at least one a row; none at density 0;
    - in the order of the axes that packs its attention into few blocks, as PAROAttention
      (arXiv 2506.16054);
    - and a share of what the dense step left behind completes it, as in Re-ttention
      (arXiv 2505.22918, Eq. 8-10): with m the output over the kept blocks, rho = exp(lse_kept -
      lse_full) and R = out_full - rho m, both of the dense step, the output is
      m + share * ((rho - 1) m + R). share 0 is AdaSpa's, 1 Re-ttention's with ramp 0, and what lies
      between is the least-squares fit of the search.

    The heads of a layer run in one launch, whatever each of them does. The file holds for each
    expert "step" int16 `[n]`, the searched steps in ascending order; "dense" uint8, "level" int8
    and "share" float16, all `[n, layers, heads]`; and "order" int8 `[layers, heads]` (index in
    `AXES`). At a dense step, level and share are those of the step after it; level is -1 where that
    is dense too.
    "densities" is a field of the search. A run of another number of steps takes the nearest
    searched one; a dense step that caches have skipped is made up for at the next call.

    refresh: must be "each"; the file says when plans are made.
    Memory until the run ends, for each layer and guidance branch: R in the dtype of the model and
    rho in fp32, of all heads. Text, and a block of the video's end that is not full, are kept whole
    as rows and columns. Raises ValueError for a file that does not fit (see
    `CalibratedAttention.calibrated`), or with tensors of other shapes or values than these.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.refresh != "each":
            raise ValueError(
                'TunedAttention takes its dense steps from the file: refresh must be "each", got '
                f"{self.refresh!r}."
            )

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        """The plan of this call: what heads remember, and all blocks of those that are due."""
        return self._state(q, call).plan(call)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """One launch for all heads; heads at a dense step then look for what they keep."""
        state = self._state(q, call)
        plan = state.plan(call)
        call.note.density = plan.mask.kept_share
        how = {"kv_len": call.kv_len, "backend": self.backend}
        out, lse = self.execute(q, k, v, plan, call)
        done = state.complete(out, call)
        due = [head for head in state.due(call) if state.level(head, call) != NOTHING]
        if due:
            call.note.searched = True
            with call.note.planning(q.device):
                state.search((q, k, v), (out, lse), due, call, how)
        state.since = state.last(call)
        return done

    def _state(self, q: Tensor, call: Call) -> "_State":
        if "state" not in call.memory:
            found = self.calibrated(call)
            heads = call.heads.total(q.shape[1])
            table = Table.of(found, call, heads)
            call.memory["state"] = _State(found, table, len(q), q.device)
        call.note.calibration = call.memory["state"].found.path
        return call.memory["state"]


@dataclass(eq=False)
class _State:
    """What one layer remembers in one guidance branch.

    since: the dense step of each head that it lives on; keep: bool `[B, H, nb, nb]`, in each head's
    order; rho: fp32 `[B, H, S]`, residual `[B, H, S, D]`, in the order of the sequence.
    """

    found: Calibration
    table: Table
    batch: int
    device: torch.device
    since: list[int | None] = field(init=False)
    keep: Tensor | None = None
    rho: Tensor | None = None
    residual: Tensor | None = None
    _plan: Plan | None = None
    _due: tuple[int, ...] | None = None

    def __post_init__(self):
        self.since = [None] * len(self.table.order)

    @property
    def block(self) -> int:
        return self.found.fields["block"]

    def last(self, call: Call) -> list[int]:
        """The dense step that each head should live on in a call, as its place in the table."""
        return self.table.last[self._row(call)]

    def level(self, head: int, call: Call) -> int:
        """What a head keeps after its last dense step."""
        return self.table.level[self.last(call)[head]][head]

    def due(self, call: Call) -> list[int]:
        """The heads that are dense in this call: a dense step is new, or the next is one too."""
        last = self.last(call)
        return [
            head
            for head, at in enumerate(last)
            if at != self.since[head] or self.table.level[at][head] == NOTHING
        ]

    def plan(self, call: Call) -> Plan:
        """The plan of a call; the same object as long as no head changes."""
        due = tuple(self.due(call))
        if self._plan is None or due or self._due:
            order = order_of(self.table.order, call.grid, self.device)
            keep = self._kept(call).clone()
            keep[:, list(due)] = True
            self._plan, self._due = Plan(BlockMask.from_keep(keep, self.block), order), due
        return self._plan

    def complete(self, out: Tensor, call: Call) -> Tensor:
        """The output, with what the heads that are not due owe to their dense steps."""
        share = list(self.table.share[self._row(call)])
        for head in self.due(call):
            share[head] = 0.0
        if not any(share) or self.residual is None:
            return out
        part = torch.tensor(share, device=out.device)[:, None, None]
        band = out.float() * (1 + part * (self.rho[..., None] - 1))
        return (band + part * self.residual).to(out.dtype)

    def search(self, qkv: tuple, dense: tuple, heads: list[int], call: Call, how: dict) -> None:
        """Chooses blocks for heads whose dense output and lse are given, and keeps what these
        blocks leave out."""
        q, k, v = (x[:, heads] for x in qkv)
        out, lse = (x[:, heads] for x in dense)
        axes = [self.table.order[head] for head in heads]
        order = order_of(axes, call.grid, self.device)
        mass = _mass(q, k, lse, order, self.block, call.kv_len)
        keep = self._kept(call)
        for i, head in enumerate(heads):
            density = self.table.densities[self.level(head, call)]
            keep[:, head] = heaviest(mass[:, i : i + 1], density, self.block, call.grid)[:, 0]
        mask = BlockMask.from_keep(keep[:, heads], self.block)
        band, less = execute(q, k, v, Plan(mask, order), **how)
        rho = (less - lse).exp_().clamp_(max=1)
        if self.residual is None:
            self.rho = lse.new_zeros(qkv[0].shape[:3])
            self.residual = torch.zeros_like(qkv[0])
        self.rho[:, heads] = rho
        left = out.float() - rho[..., None] * band.float()
        self.residual[:, heads] = left.to(self.residual.dtype)

    def _row(self, call: Call) -> int:
        return self.table.row(self.found.step_of(call))

    def _kept(self, call: Call) -> Tensor:
        if self.keep is None:
            nb = -(-call.grid.tokens // self.block)
            shape = (self.batch, len(self.since), nb, nb)
            self.keep = torch.ones(shape, dtype=torch.bool, device=self.device)
        return self.keep


def heaviest(mass: Tensor, density: float, block: int, grid: Grid) -> Tensor:
    """The blocks of largest mass of each head's map, at least one a row, bool like `mass`.

    mass: fp32 `[B, H, rows, nb]` of all query blocks, or of some that hold nothing but video. The
    density counts pairs of such blocks, and 0 is none of them; all others are always kept.
    """
    video = grid.video // block
    keep = torch.ones_like(mass, dtype=torch.bool)
    score = mass[..., :video, :video]
    if density and video:
        # Each row's heaviest block first, so that no row starves.
        score = score.scatter(-1, score.argmax(-1, keepdim=True), torch.inf)
        count = max(round(density * score[0, 0].numel()), score.shape[2])
        keep[..., :video, :video] = top_blocks(score, count, block, per="head").keep()
    else:
        keep[..., :video, :video] = False
    return keep


def order_of(axes: Sequence[int], grid: Grid, device: torch.device) -> Tensor | None:
    """`Plan.order` of heads with these axis orders: None if all are the sequence's."""
    if not any(axes):
        return None
    return torch.stack([axis_order(grid, AXES[index], device) for index in axes])


def _mass(q, k, lse, order: Tensor | None, block: int, kv_len: Tensor | None) -> Tensor:
    """`block_mass` in the heads' orders, of the real tokens, fp32 `[B, H, nb, nb]`."""
    if order is not None:
        q, k, lse = (reorder(x, order) for x in (q, k, lse))
    if kv_len is None:
        return block_mass(q, k, lse, block)
    starts = torch.arange(0, q.shape[2], block, device=q.device)
    valid = (kv_len[:, None] - starts).clamp(0, block).to(torch.int32)
    rows = zip(q.split(1), k.split(1), lse.split(1), valid, strict=True)
    return torch.cat([block_mass(*row, block, valid=real) for *row, real in rows])
