"""Selection: from scores of blocks to the lists of a `BlockMask`, without a sort on the GPU.

    mask = top_blocks(score, 64, block=128)

`reference.py` is the specification and the path of CPU and MPS, `triton.py` that of GPUs. A backend
is a file with `supports(x) -> reason | None`, `top`, `above` and `lists`, and a line in `BACKENDS`.
"""

from math import isnan
from types import ModuleType

import torch
from torch import Tensor

from vdit_sparse.kernels.backends import choose
from vdit_sparse.kernels.block_mask import BlockMask, block_pair
from vdit_sparse.kernels.checks import check_device, check_valid

__all__ = ["BACKENDS", "ascending_lists", "threshold_blocks", "top_blocks"]

# In the order of preference when none is asked for.
BACKENDS = {
    "triton": "vdit_sparse.kernels.select.triton",
    "reference": "vdit_sparse.kernels.select.reference",
}
PER = ("row", "head")


def top_blocks(
    score: Tensor,
    count: int | Tensor,
    block: int | tuple[int, int],
    *,
    per: str = "row",
    always: Tensor | None = None,
    valid: Tensor | None = None,
    backend: str | None = None,
) -> BlockMask:
    """The `count` blocks of highest score of each query block ("row") or of each head's whole map
    ("head"), as lists.

    score: fp32 `[B|1, H|1, nq, nk]`, any strides; a size of 1 is shared and stays 1 in the mask.
        NaN counts as -inf, -0 as 0; blocks of score -inf are chosen last, but are chosen.
    count: int, or an integer tensor that broadcasts to `[B, H]` (for "row" also `[B, H, nq]`, with
        three dimensions), B and H those of `score`; clamped to 0 and the number of candidates.
        Exactly so many are kept; of equal scores the one of lower index, in row-major order for
        "head".
    block: tokens of a block, one size or (query block, key block).
    always: bool, broadcasts to `score`: blocks kept whatever their score, beyond the budget; one
        that is also among the highest counts there once.
    valid: int32 `[nk]` as in `BlockMask`. Key blocks with no real token are never listed, not even
        by `always`.
    backend: a name in `BACKENDS`, which runs or raises; default Triton on a GPU, else the
        reference.

    "row" is two launches: bisection of the k-th value over the integer image of the fp32 bits, all
    of a row in registers, and the lists. "head" is seven, as a map is spread over many programs:
    four digits of a radix selection, equal scores of each row, choice, lists. Beside these an int
    is filled into a tensor. Reads one number back from the device (the widest list) unless `per` is
    "row", `count` an int and `always` None.

    Raises TypeError and ValueError for arguments that do not fit.
    """
    _check_score(score, valid)
    if per not in PER:
        raise ValueError(f"per must be one of {PER}, got {per!r}.")
    # Only then is the width known before the kernel has run.
    cap = None
    if per == "row" and always is None and isinstance(count, int):
        cap = _cap_of(count, score.shape[-1], valid is not None)
    counts = _as_counts(count, per, score)
    always = None if always is None else _as_always(always, score)
    module = choose(BACKENDS, backend, score)
    keep, cnt = module.top(score.detach(), counts, per, always, valid)
    return _mask(module, keep, cnt, block, valid, cap)


def threshold_blocks(
    score: Tensor,
    threshold: float | Tensor,
    block: int | tuple[int, int],
    *,
    always: Tensor | None = None,
    valid: Tensor | None = None,
    backend: str | None = None,
) -> BlockMask:
    """The blocks with a score of at least `threshold`, as lists.

    threshold: float, or a floating-point tensor that broadcasts to `[B, H]` of `score`; rounded to
        fp32. Where a tensor holds NaN nothing reaches it.

    Everything else is as in `top_blocks`. Two launches; always reads one number back.
    """
    _check_score(score, valid)
    thresholds = _as_thresholds(threshold, score)
    always = None if always is None else _as_always(always, score)
    module = choose(BACKENDS, backend, score)
    keep, cnt = module.above(score.detach(), thresholds, always, valid)
    return _mask(module, keep, cnt, block, valid, None)


def ascending_lists(keep: Tensor, cap: int, *, backend: str | None = None) -> Tensor:
    """The columns of the first `cap` True entries of each row, ascending.

    keep: bool `[B, H, nq, nk]`; cap: 1 to nk. Returns int32 `[B, H, nq, cap]`; what follows the
    last True entry of a row is a column too, but means nothing.
    """
    return choose(BACKENDS, backend, keep).lists(keep, cap)


def _mask(
    module: ModuleType,
    keep: Tensor,
    cnt: Tensor,
    block: int | tuple[int, int],
    valid: Tensor | None,
    cap: int | None,
) -> BlockMask:
    nk = keep.shape[-1]
    if cap is None:
        cap = max(int(torch.where(cnt < nk, cnt, 0).max()), 1)
    return BlockMask(module.lists(keep, cap), cnt, nk, *block_pair(block), valid)


def _cap_of(count: int, nk: int, has_valid: bool) -> int:
    if count >= nk and not has_valid:
        return 1  # every row keeps everything, so that no list is read
    return min(max(count, 1), nk)


def _check_score(score: Tensor, valid: Tensor | None) -> None:
    if score.ndim != 4 or 0 in score.shape:
        raise ValueError(
            f"score must be [B|1, H|1, nq, nk] and not empty, got {tuple(score.shape)}."
        )
    if score.dtype != torch.float32:
        raise TypeError(f"score must be fp32, got {score.dtype}: pass score.float().")
    if valid is not None:
        check_valid(valid, score.shape[-1], score, "score")


def _expanded(name: str, x: Tensor, sizes: tuple[int, ...], score: Tensor) -> Tensor:
    """x as a view of `sizes`, which belong to `score`."""
    check_device(x, name, score, "score")
    fits = x.ndim <= len(sizes) and all(
        n in (1, size) for n, size in zip(reversed(x.shape), reversed(sizes), strict=False)
    )
    if not fits:
        raise ValueError(
            f"{name} must broadcast to {list(sizes)}, got {tuple(x.shape)}; sizes are those of "
            f"score {tuple(score.shape)}: expand score if heads that share it differ here."
        )
    return x.expand(sizes)


def _as_counts(count: int | Tensor, per: str, score: Tensor) -> Tensor:
    """The counts as a view of `[B, H, nq]` for "row" or of `[B, H]` for "head"."""
    B, H, nq, nk = score.shape
    if isinstance(count, int):
        most = nq * nk
        count = torch.full((1, 1), min(max(count, 0), most), dtype=torch.int32, device=score.device)
    if not isinstance(count, Tensor):
        raise TypeError(f"count must be an int or an integer tensor, got {type(count).__name__}.")
    if count.is_floating_point() or count.is_complex() or count.dtype == torch.bool:
        raise TypeError(f"count must be an integer tensor, got {count.dtype}.")
    if per == "head":
        return _expanded("count", count, (B, H), score)
    if count.ndim < 3:
        count = _expanded("count", count, (B, H), score)[..., None]
    return _expanded("count", count, (B, H, nq), score)


def _as_thresholds(threshold: float | Tensor, score: Tensor) -> Tensor:
    """The thresholds as an fp32 view of `[B, H]`."""
    if isinstance(threshold, (int, float)):
        if isnan(threshold):
            raise ValueError("threshold must be a number, got nan.")
        threshold = torch.full((1, 1), threshold, dtype=torch.float32, device=score.device)
    if not isinstance(threshold, Tensor) or not threshold.is_floating_point():
        what = threshold.dtype if isinstance(threshold, Tensor) else type(threshold).__name__
        raise TypeError(f"threshold must be a float or a floating-point tensor, got {what}.")
    return _expanded("threshold", threshold.detach().float(), tuple(score.shape[:2]), score)


def _as_always(always: Tensor, score: Tensor) -> Tensor:
    if always.dtype != torch.bool:
        raise TypeError(f"always must be bool, got {always.dtype}.")
    return _expanded("always", always, tuple(score.shape), score)
