"""PAROAttention: block masks found offline, for tokens in the axis order that suits each head."""

from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from vdit_sparse.calibration import CalibratedAttention, Calibration
from vdit_sparse.grid import Grid
from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.method import Call, Plan
from vdit_sparse.orders import AXES, axis_order

# Guidance branches have memories of their own, but not plans: both hold the same one.
_PLANS: WeakValueDictionary[tuple, Plan] = WeakValueDictionary()


@dataclass(frozen=True, kw_only=True)
class PAROAttention(CalibratedAttention):
    """Offline masks: each head reads the tokens in the order of the axes that packs its attention
    into dense blocks, and visits the blocks that a search found heavy in this part of the run.

    Source: PAROAttention, arXiv 2506.16054. A head that attends along time or along columns has
    its weight scattered over many blocks in raster order, and gathered in few if the video is
    flattened with that axis fastest. `vdit-sparse calibrate --method paro` (`PAROSearch`)
    chooses one of the six orders for each layer and head, and a mask for each bin of steps, layer
    and head. A call then

    - takes the bin of its step, by the share of the run where the number of steps differs, and
      of the nearest searched step where this one was not searched (experts of Wan 2.2);
    - permutes the video of q, k, v head by head, after RoPE; text stays last and in place;
    - computes the kept blocks, its softmax over these alone, and permutes the output back.

    The file holds for each expert "order" int8 `[layers, heads]` (index in `AXES`), "bin" int16 or
    int32 `[steps]` (-1: not searched), and "keep" uint8 `[bins, layers, heads, ceil(nb * nb / 8)]`
    (`pack`), nb blocks of the file's grid a side, of which those of video alone are read. Masks do
    not depend on the prompt or its length, and guidance branches share them.

    calibration, block: see `CalibratedAttention`; the search has `block` 64.
    dense_steps: 0, for the paper sparsifies all steps (the authors' demo keeps early ones dense).
    precision: the paper's 8-bit attention is INT8 for QK and PV. The 8-bit precisions here take the
        mean off K before INT8, as the authors' code does not, and multiply PV in bf16 or FP8.

    A block with text, and the last of the video where the video fills no whole number of blocks,
    are kept whole as rows and columns whatever the file says; a row that the file leaves empty
    keeps its own block. The authors' demo takes the first video tokens for text to align blocks;
    here text is last, and only the block that holds the end of the video and text is dense. Plans
    are kept until the bin changes, so that `refresh="each"` builds nothing within one.

    Raises ValueError for a file that does not fit the call (see `CalibratedAttention.calibrated`),
    or with tensors of other shapes than above.
    """

    def plan(self, q: Tensor, k: Tensor, call: Call) -> Plan:
        """The plan of this bin of steps and layer; q and k say only how many heads and where."""
        found = self.calibrated(call)
        if "tensors" not in call.memory:  # checked once a run, like the file
            call.memory["tensors"] = _tensors(found, call, call.heads.total(q.shape[1]))
        number = _bin(call.memory["tensors"]["bin"], found.step_of(call))
        if call.memory.get("bin", (None,))[0] != number:
            call.memory["bin"] = number, _shared_plan(found, number, call, q)
        return call.memory["bin"][1]


def pack(keep: Tensor) -> Tensor:
    """bool `[..., nb, nb]` -> uint8 `[..., ceil(nb * nb / 8)]`: row-major, the first of eight
    entries in the highest bit, as numpy's `packbits`."""
    flat = keep.flatten(-2).to(torch.uint8)
    octets = pad(flat, (0, -flat.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (octets << _shifts(keep.device)).sum(-1, dtype=torch.uint8)


def unpack(bits: Tensor, blocks: int) -> Tensor:
    """The inverse of `pack`: uint8 `[..., ceil(nb * nb / 8)]` -> bool `[..., nb, nb]`, nb =
    `blocks`."""
    flat = ((bits[..., None] >> _shifts(bits.device)) & 1).flatten(-2)
    return flat[..., : blocks * blocks].bool().unflatten(-1, (blocks, blocks))


def whole_blocks(grid: Grid, block: int) -> int:
    """How many blocks at the start of the sequence are full of video tokens alone; those after
    them are always kept."""
    return grid.video // block


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=device)


def _bin(bins: Tensor, step: int) -> int:
    """The bin of the searched step nearest to `step`, the earlier of two."""
    numbers = bins.tolist()
    searched = [other for other, number in enumerate(numbers) if number >= 0]
    return numbers[min(searched, key=lambda other: abs(other - step))]


def _shared_plan(found: Calibration, number: int, call: Call, q: Tensor) -> Plan:
    """The plan of a bin and layer, the same object for all who hold one."""
    key = (found, number, call.origin.expert, call.layer, call.grid, call.heads, q.device)
    plan = _PLANS.get(key)
    if plan is None:
        # It may outlive the inference mode of whoever asked first.
        with torch.inference_mode(False):
            plan = _PLANS[key] = _plan(found, number, call, q)
    return plan


def _plan(found: Calibration, number: int, call: Call, q: Tensor) -> Plan:
    tensors, block = call.memory["tensors"], found.fields["block"]
    keep = call.heads.own(tensors["keep"][number, call.layer], 0).to(q.device)
    edge = whole_blocks(call.grid, block)
    keep = unpack(keep, -(-found.grid.tokens // block))[..., :edge, :edge]
    rest = -(-call.grid.tokens // block) - edge
    keep = pad(keep, (0, rest, 0, rest), value=True)
    keep |= torch.diag_embed(~keep.any(-1))
    own_axes = call.heads.own(tensors["order"][call.layer], 0)
    names = [AXES[index] for index in own_axes.tolist()]
    order = None
    if set(names) != {"FHW"}:
        order = torch.stack([axis_order(call.grid, axes, q.device) for axes in names])
    return Plan(BlockMask.from_keep(keep, block), order)


def _tensors(found: Calibration, call: Call, heads: int) -> dict[str, Tensor]:
    """What the file holds for this expert, if it has the shapes that it should have."""
    tensors = {name: found.tensor(name, call.origin.expert) for name in ("order", "bin", "keep")}
    order, bins, keep = tensors.values()
    blocks = -(-found.grid.tokens // found.fields["block"])
    shapes = {
        "order": (found.layers, heads),
        "bin": (found.steps,),
        "keep": (*keep.shape[:1], found.layers, heads, -(-blocks * blocks // 8)),
    }
    kinds = {"order": torch.int8, "keep": torch.uint8}
    for name, x in tensors.items():
        if x.shape != shapes[name] or x.dtype != kinds.get(name, x.dtype) or not x.numel():
            raise ValueError(
                f"{found.path}: {name!r} must be {kinds.get(name, 'integers')} {shapes[name]} for "
                f"{heads} heads, got {x.dtype} {tuple(x.shape)}. Calibrate again."
            )
    for name, x, low, end in (("order", order, 0, len(AXES)), ("bin", bins, -1, len(keep))):
        if x.is_floating_point() or x.min() < low or not max(low, 0) <= x.max() < end:
            raise ValueError(
                f"{found.path}: {name!r} must hold integers from {low} to {end - 1}, got "
                f"{x.min()} to {x.max()} ({x.dtype}). Calibrate again."
            )
    return tensors
