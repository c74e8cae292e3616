"""What a method would compute and keep on a grid, as far as that is known without q and k."""

import dataclasses
import math
from dataclasses import dataclass

import torch

from vdit_sparse.app.options import InputError, method_name
from vdit_sparse.calibration import CalibratedAttention
from vdit_sparse.call import Call
from vdit_sparse.grid import Grid
from vdit_sparse.kernels.block_mask import BLOCK_SIZES
from vdit_sparse.method import Plan, SparseAttention
from vdit_sparse.methods import (
    AdaSpaAttention,
    DraftAttention,
    RadialAttention,
    RettentionAttention,
)
from vdit_sparse.orders import text_blocks
from vdit_sparse.pipelines.anatomy import Anatomy

# Methods whose plan is a function of the grid alone.
GEOMETRIC = (RadialAttention, RettentionAttention)
# Bytes of an index in a list, and of a score or LSE.
WORD = 4


@dataclass(frozen=True)
class Run:
    """One run of a method: steps; guidance branches that are calls of their own; batch rows."""

    steps: int
    branches: int
    rows: int


@dataclass(frozen=True)
class Sparsity:
    """What a method does on a grid.

    density: kept share of key blocks in a sparse call; None where only its calibration says.
    source: where that number comes from. run: mean density of a run, what is dense counted as 1.
    dense: (sparse, all) calls of a run. blocks: of the sequence. memory: bytes by what they are
    for.
    """

    density: float | None
    source: str
    run: float | None
    sparse_calls: int
    calls: int
    block: int
    blocks: int
    memory: dict[str, int]


def with_density(method: SparseAttention, density: float | None) -> SparseAttention:
    """The method with `density` in its field of that name, if it has one. Raises InputError where
    the density follows from other fields."""
    if density is None or isinstance(method, CalibratedAttention):
        return method
    if not hasattr(method, "density"):
        raise InputError(
            f"--density: that of {method_name(method)} follows from its geometry; use --set "
            "decay=... or other fields."
        )
    try:
        return dataclasses.replace(method, density=density)
    except ValueError as error:
        raise InputError(f"--density: {error}") from error


def sparsity(
    method: SparseAttention, grid: Grid, anatomy: Anatomy, run: Run, assumed: float | None = None
) -> Sparsity:
    """What the method does on this grid; `assumed` is the density of a calibrated one. Raises
    InputError for a number of steps that the method's fields do not allow."""
    plan = _geometric_plan(method, grid, anatomy, run)
    block = method.block or BLOCK_SIZES[0]
    blocks = math.ceil(grid.tokens / block)
    density, source = _density(method, grid, block, blocks, plan, assumed)
    sparse, dense = _calls(method, grid, anatomy.layers, run.steps)
    calls = sparse + dense
    return Sparsity(
        density,
        source,
        None if density is None else (sparse * density + dense) / calls,
        sparse,
        calls,
        block,
        blocks,
        _memory(method, grid, anatomy, run, blocks, density, plan),
    )


def _geometric_plan(method, grid: Grid, anatomy: Anatomy, run: Run) -> Plan | None:
    if not isinstance(method, GEOMETRIC):
        return None
    nothing = torch.empty(0, device="cpu")
    return method.plan(nothing, nothing, Call(grid, 0, anatomy.layers, 0, run.steps, {}))


def _density(
    method, grid: Grid, block: int, blocks: int, plan: Plan | None, assumed: float | None
) -> tuple[float | None, str]:
    if plan is not None:
        return plan.mask.density(), "exact: its plan is geometry"
    if isinstance(method, CalibratedAttention):
        said = "as --density says" if assumed else "its calibration says; assume one by --density"
        return assumed, said
    text = float(text_blocks(grid, block).float().mean())
    what = "its field density, and the blocks of text" if text else "its field density"
    return text + (1 - text) * method.density, f"about: {what}"


def _calls(method: SparseAttention, grid: Grid, layers: int, steps: int) -> tuple[int, int]:
    """(sparse, dense) self-attention calls of a run of one branch; searches and cache steps that
    compute everything are dense."""
    sparse, memory = 0, {}
    try:
        for step in range(steps):
            places = [Call(grid, layer, layers, step, steps, memory) for layer in range(layers)]
            here = [call for call in places if not method.is_dense(call)]
            if not here:
                continue
            due, first = method.is_due(here[0]), "built" not in memory
            sparse += 0 if due and _is_full(method, first) else len(here)
            if due:
                memory["built"] = step
    except ValueError as error:
        raise InputError(f"{method_name(method)} in {steps} steps: {error}") from error
    return sparse, steps * layers - sparse


def _is_full(method: SparseAttention, first: bool) -> bool:
    """Whether a call that builds a plan computes everything."""
    if isinstance(method, AdaSpaAttention):
        return method.dense_search and (first or not method.cache_lse)
    return isinstance(method, RettentionAttention)


def _memory(
    method, grid: Grid, anatomy: Anatomy, run: Run, blocks: int, density: float | None, plan
) -> dict[str, int]:
    """Bytes of index lists, of scores while a plan is built, and of what waits between steps."""
    heads = run.rows * anatomy.heads
    places = anatomy.layers * run.branches
    if plan is not None:
        tensors = (plan.mask.idx, plan.mask.cnt, plan.order, plan.mask.valid)
        found = {"lists": sum(x.nbytes for x in tensors if x is not None)}
    else:
        # The widest list sets the width; half as many again as the mean.
        width = min(1.5 * (density or 1.0), 1.0) * blocks
        kept = 1 if method.refresh == "each" else places
        found = {"lists": int(kept * heads * blocks * (width + 1)) * WORD}
    if isinstance(method, DraftAttention | AdaSpaAttention):
        found["scores"] = heads * blocks**2 * WORD
    if isinstance(method, AdaSpaAttention) and method.cache_lse and method.refresh != "once":
        found["lse"] = places * heads * grid.tokens * WORD
    if isinstance(method, RettentionAttention):
        about = (grid, anatomy.heads, anatomy.head_dim, anatomy.layers)
        where = "residuals in RAM" if method.offload else "residuals"
        found[where] = method.memory(*about, branches=run.branches, batch=run.rows)
    return found
