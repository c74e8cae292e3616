"""`pool_blocks` in plain torch: reordered rows are made for a few blocks at a time."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from vdit_sparse.kernels.reorder.plain import forward as reorder

# Bytes of reordered rows held at once; on a CPU they should stay in its caches.
CPU_BUDGET = 4 * 2**20
DEVICE_BUDGET = 256 * 2**20


def supports(x: Tensor) -> str | None:
    """None: this backend computes everything that the public function accepts."""
    return None


def forward(x: Tensor, block: int, nb: int, order: Tensor | None, valid: Tensor | None) -> Tensor:
    """See `pool_blocks`; nb: number of blocks."""
    if order is None and valid is None:
        return _pool_in_place(x, block)
    B, H, _, D = x.shape
    slots = _real_slots(x, block, nb, order, valid)
    budget = CPU_BUDGET if x.device.type == "cpu" else DEVICE_BUDGET
    step = max(1, budget // (B * H * block * D * x.itemsize))
    means = []
    for part in slots.split(step * block, -1):
        sums = reorder(x, part).unflatten(2, (-1, block)).sum(3, dtype=torch.float32)
        counted = (part >= 0).unflatten(-1, (-1, block)).sum(-1)
        means.append(sums / counted.clamp(min=1)[..., None])
    return torch.cat(means, 2)


def _pool_in_place(x: Tensor, block: int) -> Tensor:
    """Blocks of x where they lie; only the last can be ragged."""
    whole = x.shape[2] // block * block
    parts = []
    if whole:
        blocks = x[:, :, :whole].unflatten(2, (-1, block))
        parts.append(blocks.mean(3, dtype=torch.float32))
    if whole < x.shape[2]:
        parts.append(x[:, :, whole:].mean(2, keepdim=True, dtype=torch.float32))
    return torch.cat(parts, 2)


def _real_slots(
    x: Tensor, block: int, nb: int, order: Tensor | None, valid: Tensor | None
) -> Tensor:
    """The order over whole blocks, `[nb * block]` or `[H, nb * block]`, -1 where nothing counts."""
    if order is None:
        order = torch.arange(x.shape[2], device=x.device)
    slots = pad(order, (0, nb * block - order.shape[-1]), value=-1)
    if valid is not None:
        inside = torch.arange(block, device=x.device) < valid[:, None]
        slots = slots.masked_fill(~inside.flatten(), -1)
    return slots
