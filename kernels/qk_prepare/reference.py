"""`prepare` and `merge_heads` in plain torch: the specification."""

import torch
from torch import Tensor

from vdit_sparse.kernels.reorder import inverse, reorder


def supports(x: Tensor) -> str | None:
    """None: the reference computes everything that the public functions accept."""
    return None


def forward(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    tail: Tensor | None,
    tail_weight: Tensor | None,
    back: Tensor | None,
    eps: float,
    round_first: bool,
    slots: int,
) -> Tensor:
    """See `prepare`; cos and sin: `[R, D]`."""
    rows = _normalize(x, weight, eps, round_first)
    if cos is not None:
        R = cos.shape[0]
        rows = torch.cat([_rotate(rows[:, :R], cos, sin), rows[:, R:]], 1)
    if tail is not None:
        rows = torch.cat([rows, _normalize(tail, tail_weight, eps, round_first)], 1)
    if back is None:
        return rows.contiguous()
    back = torch.where(back < slots, back, -1)
    order = inverse(back, slots)
    return reorder(rows.transpose(1, 2), order, backend="torch").transpose(1, 2).contiguous()


def merge_heads(x: Tensor, back: Tensor | None) -> Tensor:
    """See `merge_heads` of the package."""
    if back is not None:
        x = reorder(x, back, backend="torch")
    # An operator must not return a view of its input.
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).flatten(2)


def _normalize(x: Tensor, weight: Tensor, eps: float, round_first: bool) -> Tensor:
    """RMSNorm `[B, S, H, D]` over all heads for weights `[H * D]`, over each for `[D]`."""
    rows = x.flatten(2) if weight.numel() == x.shape[2] * x.shape[3] else x
    wide = rows.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if round_first:
        wide = wide.to(x.dtype).float()
    return (wide * weight.float()).to(x.dtype).view(x.shape)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on interleaved pairs: x `[B, R, H, D]`; cos, sin `[R, D]`, each value twice."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    cos, sin = cos[None, :, None, 0::2], sin[None, :, None, 1::2]
    pairs = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return pairs.flatten(-2).to(x.dtype)
