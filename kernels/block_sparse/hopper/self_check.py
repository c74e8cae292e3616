"""The Hopper kernel against the reference, once per process and kind of call, before it is used.

It may compute wrongly or never end. The first is a reason not to use it. After the second the GPU
is lost to this process, which is told so instead of waiting without a word.
"""

from dataclasses import replace
from functools import cache
from time import monotonic, sleep

import torch
from torch import Tensor
from triton.runtime.errors import TritonError

from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.block_sparse.hopper.launch import (
    launch,
    launch_skipping,
    programs_at_once,
)
from vdit_sparse.kernels.block_sparse.hopper.variants import Variant, variant_for
from vdit_sparse.kernels.block_sparse.reference import forward as reference_forward

# Relative L2 error against exact attention on normal data: rounding alone makes 2.3e-3, 1.3e-2 and
# 3.7e-2 of it.
LARGEST_ERROR = {"bf16": 7e-3, "int8_bf16": 1.6e-2, "int8_fp8": 4.5e-2}
LARGEST_LSE_ERROR = {"bf16": 1e-3, "int8_bf16": 0.05, "int8_fp8": 0.05}
SECONDS = 20.0  # after which the kernel counts as hung; it takes under a millisecond
TOKENS = 300  # queries and keys: three blocks of 128 or five of 64, the last one ragged
PADDED = 210  # kv_len of padded calls: less by one or two blocks, and ragged again


def why_distrusted(
    device: torch.device,
    dtype: torch.dtype,
    D: int,
    blocks: tuple[int, int],
    precision: str,
    valid: bool,
    padded: bool = False,
    skipping: bool = False,
) -> str | None:
    """Why the kernel may not be used for such calls, None if it computed one correctly; padded:
    with kv_len; skipping: with skip_threshold. Raises TimeoutError if it does not end.

    Compiling and comparing are no work for a graph capture: there a kind of call that was not seen
    before is refused.
    """
    kind = (device, dtype, D, blocks, precision, valid, padded, skipping)
    if kind not in _seen and torch.cuda.is_current_stream_capturing():
        return "its self-check cannot run in a graph capture; make one such call before capturing"
    _seen.add(kind)
    return _check(*kind)


_seen = set()


@cache
def _check(
    device: torch.device,
    dtype: torch.dtype,
    D: int,
    blocks: tuple[int, int],
    precision: str,
    valid: bool,
    padded: bool = False,
    skipping: bool = False,
) -> str | None:
    q, k, v, mask = problem(device, dtype, D, blocks, valid)
    kv_len = torch.tensor([PADDED], dtype=torch.int32, device=device) if padded else None
    # On the CPU, so that all that was queued before is done when the clock below starts.
    exact = [
        x.cpu()
        for x in reference_forward(*(x.float() for x in (q, k, v)), mask, D**-0.5, kv_len, "bf16")
    ]
    variant = variant_for(D, blocks, precision, valid)
    times = repeats(variant, device)
    exact = [x.repeat_interleave(times, 1) for x in exact]
    call = (*repeated(q, k, v, mask, times), D**-0.5, kv_len)
    try:
        loose = launch_skipping(*call, 1.0, variant)[:2] if skipping else None
        if skipping:
            out, lse, _ = launch_skipping(*call, 1e-30, variant)
        else:
            out, lse = launch(*call, precision, variant)
        wait_for(device)
    except (TritonError, RuntimeError) as error:
        return f"its self-check failed: {type(error).__name__}: {str(error).strip()[:200]}"
    if skipping and not bool((loose[1] <= lse + LARGEST_LSE_ERROR["bf16"]).all()):
        return "its self-check failed: leaving tiles out added weights"
    return why_wrong(out.cpu(), lse.cpu(), *exact, precision)


def wait_for(device: torch.device) -> None:
    """Waits until the work queued on this device is done, `SECONDS` at most. Raises TimeoutError
    after that."""
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))
    end = monotonic() + SECONDS
    while not done.query():
        if monotonic() > end:
            raise TimeoutError(
                f"The Hopper attention kernel did not end its self-check within {SECONDS:.0f} s "
                f"and still holds {device}: end this process, and pass backend='triton' in the "
                "next one."
            )
        sleep(0.001)


def why_wrong(
    out: Tensor, lse: Tensor, expected: Tensor, expected_lse: Tensor, precision: str
) -> str | None:
    """Why this result is not attention, None if it is."""
    empty = expected_lse.isinf()
    if not torch.equal(lse.isinf(), empty) or bool(out[empty].any()):
        return "its self-check failed: rows without keys are wrong"
    error = float((out.float() - expected).norm() / expected.norm())
    lse_error = float((lse - expected_lse)[~empty].abs().max())
    if not (error <= LARGEST_ERROR[precision] and lse_error <= LARGEST_LSE_ERROR[precision]):
        return (
            f"its self-check failed: errors of {error:.1e} and, of lse, {lse_error:.1e}, where "
            f"{LARGEST_ERROR[precision]:.1e} and {LARGEST_LSE_ERROR[precision]:.1e} are allowed"
        )
    return None


def repeats(variant: Variant, device: torch.device) -> int:
    """How often the problem's heads have to come for a program to compute several tiles, where it
    does."""
    if not variant.persistent:
        return 1
    tiles = 2 * -(-TOKENS // variant.rows)
    return -(-3 * programs_at_once(variant, device) // tiles)


def repeated(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, times: int
) -> tuple[Tensor, Tensor, Tensor, BlockMask]:
    """The same problem with each head `times` times."""
    q, k, v = (x.transpose(1, 2).repeat_interleave(times, 2).transpose(1, 2) for x in (q, k, v))
    idx, cnt = (x.repeat_interleave(times, 1) for x in (mask.idx, mask.cnt))
    return q, k, v, replace(mask, idx=idx, cnt=cnt)


def problem(
    device: torch.device, dtype: torch.dtype, D: int, blocks: tuple[int, int], valid: bool
) -> tuple[Tensor, Tensor, Tensor, BlockMask]:
    """q, k, v and a mask with a full row, an empty one, and a ragged end; the same every time,
    without touching torch's random numbers."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, TOKENS, 2, D, generator=generator).to(device, dtype).transpose(1, 2)
        for _ in range(3)
    )
    nq, nk = (-(-TOKENS // block) for block in blocks)
    keep = torch.rand(2, nq, nk, generator=generator) < 0.6
    keep[:, 0], keep[0, 1], keep[1, -1, -1] = True, False, True
    slots = None
    if valid:
        slots = torch.randint(0, blocks[1] + 1, (nk,), generator=generator, dtype=torch.int32)
        slots[0] = blocks[1]
    return q, k, v, BlockMask.from_keep(keep, blocks, valid=slots).to(device)
