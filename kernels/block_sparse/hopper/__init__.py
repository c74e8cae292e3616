"""The backend for NVIDIA Hopper (compute capability 9.0): one kernel in Triton's Gluon.

Gluon is Triton's lower level, which its authors change from version to version: this backend runs
under the versions it was measured with only, and after it has computed a small problem correctly
on this machine. Elsewhere it says why not, and the Triton backend takes the call.
"""

import torch
import triton
from torch import Tensor

from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.block_sparse.hopper.variants import variant_for
from vdit_sparse.kernels.block_sparse.layout import why_no_descriptors
from vdit_sparse.kernels.block_sparse.tiles import architecture
from vdit_sparse.kernels.triton_ops import INTERPRETED

TRITON_VERSIONS = ("3.6",)
HEADS = (64, 128)


def supports(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, precision: str) -> str | None:
    """None if this backend computes the call, else the reason why it does not.

    The first question about a dtype, D, blocks and precision compiles the kernel and checks it: a
    few seconds.
    """
    reason = why_not_here(architecture(q.device), triton.__version__)
    if reason is None:
        reason = why_not_these(q, k, v, precision)
    if reason is None:
        # That module needs Gluon.
        from vdit_sparse.kernels.block_sparse.hopper.self_check import why_distrusted

        blocks = (mask.block_q, mask.block_k)
        valid = mask.valid is not None
        reason = why_distrusted(q.device, q.dtype, q.shape[-1], blocks, precision, valid)
    return reason


def why_not_here(arch: str, version: str) -> str | None:
    """Why the kernel does not run on a GPU of this architecture under this Triton."""
    if arch != "sm_90" or INTERPRETED:
        name = "Triton's interpreter" if INTERPRETED else arch
        return f"it needs NVIDIA compute capability 9.0 (Hopper), this is {name}"
    if version.rsplit(".", 1)[0] not in TRITON_VERSIONS:
        return f"it was tested with Triton {', '.join(TRITON_VERSIONS)}, this is {version}"
    return None


def why_not_these(q: Tensor, k: Tensor, v: Tensor, precision: str) -> str | None:
    """Why the kernel does not take these tensors, None if it does."""
    D = q.shape[-1]
    if q.dtype not in (torch.float16, torch.bfloat16) or D not in HEADS:
        return f"it takes D of 64 and 128 in fp16 and bf16, got {D} in {q.dtype}"
    if precision == "bf16":
        return why_no_descriptors(q=q, k=k, v=v)
    # What `kernels.quant` writes is aligned.
    return why_no_descriptors(v=v) if precision == "int8_bf16" else None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float,
    kv_len: Tensor | None = None,
    precision: str = "bf16",
) -> tuple[Tensor, Tensor]:
    """See `block_sparse_attention`."""
    from vdit_sparse.kernels.block_sparse.hopper.launch import launch

    if kv_len is not None:
        _check_form(q, mask, precision, padded=True)
    blocks = (mask.block_q, mask.block_k)
    variant = variant_for(q.shape[-1], blocks, precision, mask.valid is not None)
    return launch(q, k, v, mask, scale, kv_len, precision, variant)


def forward_skipping(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float,
    kv_len: Tensor | None,
    skip_threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `skipping_attention`; a tile has 64 queries."""
    from vdit_sparse.kernels.block_sparse.hopper.launch import launch_skipping

    _check_form(q, mask, "bf16", padded=kv_len is not None, skipping=True)
    blocks = (mask.block_q, mask.block_k)
    variant = variant_for(q.shape[-1], blocks, "bf16", mask.valid is not None)
    return launch_skipping(q, k, v, mask, scale, kv_len, skip_threshold, variant)


def _check_form(
    q: Tensor, mask: BlockMask, precision: str, padded: bool, skipping: bool = False
) -> None:
    """Raises RuntimeError where the kernel's form for such a call, which `supports` does not know,
    fails its own self-check."""
    from vdit_sparse.kernels.block_sparse.hopper.self_check import why_distrusted

    kind = (q.device, q.dtype, q.shape[-1], (mask.block_q, mask.block_k), precision)
    reason = why_distrusted(*kind, mask.valid is not None, padded, skipping)
    if reason is not None:
        what = "skip_threshold" if skipping else "kv_len"
        raise RuntimeError(
            f"backend 'hopper' cannot compute calls with {what}: {reason}. Pass backend='triton'."
        )
