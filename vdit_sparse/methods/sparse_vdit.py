"""Sparse-vDiT: five fixed attention patterns, one of them for each head at each layer and step."""

import math
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor

from vdit_sparse.calibration import CalibratedAttention, Calibration
from vdit_sparse.grid import Grid
from vdit_sparse.kernels.block_mask import BLOCK_SIZES, BlockMask
from vdit_sparse.method import Call, Plan, check_choice, check_number
from vdit_sparse.orders import axis_order, text_blocks

MODES = ("full", "skip", "diagonal", "multi-diagonal", "stripe")
FULL, SKIP, DIAGONAL, MULTI, STRIPE = range(5)


@dataclass(frozen=True, kw_only=True)
class Patterns:
    """The geometry of the modes; the search writes it into the calibration.

    block: tokens of a block, 64 or 128. density: kept share of key blocks of the bands and searched
    stripes, above 0 and up to 1; SVG has 0.25 for HunyuanVideo and 0.30 for Wan. stripes:
    "searched" for each layer and head, or "static": the first frame and each `every`-th block.
    sink_frames: leading frames that diagonal and stripe heads keep as keys.
    """

    block: int = 128
    density: float = 0.25
    stripes: str = "searched"
    every: int = 4
    sink_frames: int = 0

    def __post_init__(self):
        check_choice("block", self.block, BLOCK_SIZES)
        check_number("density", self.density, 0, 1)
        check_choice("stripes", self.stripes, ("searched", "static"))
        for name, low in (("every", 1), ("sink_frames", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < low:
                raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}.")


@dataclass(frozen=True, kw_only=True)
class SparseVDiTAttention(CalibratedAttention):
    """Offline choice for each step, layer and head between full attention, none, and three patterns
    that most heads of video transformers follow.

    Source: Sparse-vDiT, arXiv 2506.03065, of which no code is released. A head's mode is one of

    - 0 full: dense; 1 skip: the output is exactly 0, text rows included;
    - 2 diagonal: a band around the diagonal of blocks, in the order of the sequence;
    - 3 multi-diagonal: the same band with the video's tokens ordered by (row, column, frame), so
      that the same place in all frames lies side by side;
    - 4 stripe: all queries see the same key blocks.

    `vdit-sparse calibrate` finds them (`eval/calibrators/sparse_vdit.py`); both CFG branches and
    all batch rows share them. A step that was not searched for an expert of Wan 2.2 takes the
    nearest one that was. All heads of a layer, full ones included, run in one kernel launch.

    Ours, since the paper is silent: the band's half-width is SVG's (arXiv 2502.01776): with L
    tokens, T of them text, w = L (1 - sqrt(1 - r)) where r = density - 2 T / L, rounded down to
    whole blocks, so that a band covers about r. Modes 2 to 4 keep text blocks, and the block that
    holds the end of the video and the start of the text, whole as rows and columns. SVG's first
    frame is `sink_frames` here; a mode 3 head, which sees its place in every frame, has none.

    The plan is a function of step, layer and grid, whatever the length of the text was in the
    search; a cached one lives on while the modes stay the same.
    Geometry comes from the calibration. Raises ValueError as `calibrated` does, and if the
    calibration has another number of heads, no searched step or lacks a field.
    """

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        """The plan of this step and layer; q says how many heads there are, on which device."""
        found = self.calibrated(call)
        modes = call.heads.own(modes_at(found, call, call.heads.total(q.shape[1])), 0)
        built = call.memory.get("modes")
        if built is None or not torch.equal(built, modes):
            patterns = _patterns(found)
            searched = patterns.stripes == "searched"
            columns = None
            if searched:
                stripes = found.tensor("stripes", call.origin.expert)[call.layer]
                columns = call.heads.own(stripes, 0)
            mask = mask_of(modes, columns, call.grid, patterns, q.device)
            call.memory.update(modes=modes, mask=mask)
        return Plan(call.memory["mask"], order_of(modes, call.grid, q.device))


def modes_at(found: Calibration, call: Call, heads: int) -> Tensor:
    """The modes int8 `[heads]`, on the CPU, of the nearest step that was searched."""
    modes = found.tensor("modes", call.origin.expert)[:, call.layer]
    steps = (modes >= 0).all(-1).nonzero()[:, 0]
    if modes.shape[1] != heads or not len(steps):
        raise ValueError(
            f"{found.path} has {len(steps)} searched steps of layer {call.layer} with "
            f"{modes.shape[1]} heads, but the model has {heads} heads: calibrate this model."
        )
    return modes[steps[(steps - found.step_of(call)).abs().argmin()]]


def _patterns(found: Calibration) -> Patterns:
    names = [field.name for field in fields(Patterns)]
    missing = [name for name in names if name not in found.fields]
    if missing:
        raise ValueError(f"{found.path} lacks the field {', '.join(missing)}: calibrate again.")
    return Patterns(**{name: found.fields[name] for name in names})


def mask_of(
    modes: Tensor, columns: Tensor | None, grid: Grid, patterns: Patterns, device: torch.device
) -> BlockMask:
    """Key blocks of heads with `modes` `[H|1]`; columns: searched stripes `[H, c]`, or None."""
    modes = modes.to(device)
    keep = _masks_on(grid, patterns, device)[modes.long()]
    if columns is not None:
        own = torch.zeros(len(columns), keep.shape[-1], dtype=torch.bool, device=device)
        own.scatter_(1, columns.to(device).long(), True)
        keep = keep | (own & (modes == STRIPE)[:, None])[:, None]
    return BlockMask.from_keep(keep, patterns.block)


def order_of(modes: Tensor, grid: Grid, device: torch.device) -> Tensor | None:
    """`Plan.order` of heads with `modes` `[H|1]` on the CPU: None, `[S]` or `[H, S]`."""
    multi = modes == MULTI
    if not multi.any():
        return None
    order = axis_order(grid, "HWF", device)
    if multi.all():
        return order
    return torch.where(multi.to(device)[:, None], order, axis_order(grid, "FHW", device))


def mode_masks(grid: Grid, patterns: Patterns) -> Tensor:
    """Kept blocks of each mode, bool `[5, nb, nb]` on the CPU, mode 3 in its own token order; of
    searched stripes only what all heads have."""
    at = torch.arange(math.ceil(grid.tokens / patterns.block), device="cpu")
    first = patterns.sink_frames or int(patterns.stripes == "static")
    sink, lead = (
        at * patterns.block < min(frames, grid.frames) * grid.frame_tokens
        for frames in (patterns.sink_frames, first)
    )
    half = int(grid.tokens * (1 - math.sqrt(1 - _share(grid, patterns))) / patterns.block)
    keep = torch.zeros(len(MODES), len(at), len(at), dtype=torch.bool, device="cpu")
    keep[FULL] = True
    keep[[DIAGONAL, MULTI]] = (at[:, None] - at).abs() <= half
    keep[DIAGONAL] |= sink
    keep[STRIPE] = lead | ((at % patterns.every == 0) & (patterns.stripes == "static"))
    keep[DIAGONAL:] |= text_blocks(grid, patterns.block)
    return keep


def stripe_count(grid: Grid, patterns: Patterns) -> int:
    """How many key blocks a head's searched stripes are, besides text and sink frames: at least 1,
    even where those leave none."""
    keep = mode_masks(grid, patterns)[STRIPE]
    return max(1, min(round(_share(grid, patterns) * len(keep)), int((~keep).any(0).sum())))


def _share(grid: Grid, patterns: Patterns) -> float:
    """SVG's r: `density` less what rows and columns of text take."""
    return max(patterns.density - 2 * grid.text / grid.tokens, 0.0)


@lru_cache(maxsize=8)
def _masks_on(grid: Grid, patterns: Patterns, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return mode_masks(grid, patterns).to(device)
