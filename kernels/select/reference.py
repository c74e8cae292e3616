"""The specification, in plain torch: sort, cut, and sort the kept columns to the front."""

import torch
from torch import Tensor


def supports(x: Tensor) -> str | None:
    """None: the reference computes everything that the public functions accept."""
    return None


def top(
    score: Tensor, count: Tensor, per: str, always: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """keep, bool like `score`, and cnt, int32 `[B, H, nq]`; count is `[B, H, nq]` for "row" and
    `[B, H]` for "head". See `top_blocks`."""

    def choose(score: Tensor) -> Tensor:
        # NaN would sort above everything.
        ranked = torch.where(score.isnan(), -torch.inf, score)
        if per == "head":
            ranked = ranked.flatten(2)
        order = ranked.argsort(dim=-1, descending=True, stable=True)
        first = torch.arange(order.shape[-1], device=score.device) < count[..., None]
        return torch.zeros_like(first).scatter(-1, order, first).view(score.shape)

    return _finish(choose, score, always, valid)


def above(
    score: Tensor, threshold: Tensor, always: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `top`, with threshold fp32 `[B, H]`. See `threshold_blocks`."""

    def choose(score: Tensor) -> Tensor:
        return torch.where(score.isnan(), -torch.inf, score) >= threshold[..., None, None]

    return _finish(choose, score, always, valid)


def lists(keep: Tensor, cap: int) -> Tensor:
    """See `ascending_lists`."""
    # A stable sort of "dropped" puts the kept columns first and leaves them ascending.
    order = torch.argsort((~keep).to(torch.uint8), dim=-1, stable=True)
    return order[..., :cap].to(torch.int32).contiguous()


def _finish(choose, score: Tensor, always: Tensor | None, valid: Tensor | None):
    """`choose` asked about the candidates alone, then `always`, and the counts of the rows."""
    if valid is None:
        keep = choose(score)
    else:
        columns = (valid > 0).nonzero()[:, 0]
        keep = torch.zeros_like(score, dtype=torch.bool)
        keep[..., columns] = choose(score[..., columns])
    if always is not None:
        keep = keep | always
    if valid is not None:
        keep = keep & (valid > 0)
    return keep, keep.sum(-1, dtype=torch.int32)
