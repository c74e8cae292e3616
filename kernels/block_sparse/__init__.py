"""Block-sparse attention: softmax over the listed key blocks of each query block, several backends.

    out, lse = block_sparse_attention(q, k, v, mask)

`reference.py` is the specification, `gather.py` the path of CPU and MPS, `triton.py` that of GPUs,
`hopper/` that of NVIDIA Hopper.
A backend is a file with `supports(...) -> reason | None` and `forward(...)`, and a line in
`BACKENDS`.
"""

import torch
from torch import Tensor

from vdit_sparse.kernels import backends
from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.block_sparse.layout import empty_outputs
from vdit_sparse.kernels.checks import (
    DTYPES,
    check_device,
    check_inference,
    check_last_stride,
    checked_scale,
)

__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "block_sparse_attention",
    "choose_backend",
    "explain",
    "skipping_attention",
]

# In the order of preference when none is asked for; the reference is never chosen by itself.
BACKENDS = {
    "hopper": "vdit_sparse.kernels.block_sparse.hopper",
    "triton": "vdit_sparse.kernels.block_sparse.triton",
    "gather": "vdit_sparse.kernels.block_sparse.gather",
    "reference": "vdit_sparse.kernels.block_sparse.reference",
}
PRECISIONS = ("bf16", "int8_bf16", "int8_fp8")


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    kv_len: Tensor | None = None,
    precision: str = "bf16",
    skip_threshold: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v over the key blocks that `mask` lists for each query block.

    q `[B, H, S, D]`, k and v `[B, H, keys, D]`, fp16, bf16 or fp32, any strides with unit last one;
    mask: `ceil(S / block_q)` lists over `ceil(keys / block_k)` key blocks; scale: default D^-0.5;
    kv_len: int32 `[B]`, keys from there on are masked in that batch row, whatever they hold;
    precision: sums and softmax are in fp32, the products
        "bf16": in the inputs' own dtype;
        "int8_bf16": INT8 QK, weights and v in the inputs' own dtype (fp32 included);
        "int8_fp8": INT8 QK, weights and v in fp8 e4m3;
    skip_threshold: leave out tiles of small weights, see `skipping_attention`; default none;
    backend: a name in `BACKENDS`, which runs or raises; default `choose_backend(q, k, v, mask)`.

    Returns out, shape, dtype and memory order of q, and lse, fp32 `[B, H, S]`, the natural log of
    the sum of exponentials. A row without keys gives 0 and -inf. Inference only: raises under
    autograd. One opaque operator for torch.compile. The loop over blocks is FlashAttention-2's
    (arXiv 2307.08691, algorithm 1).

    The 8-bit precisions are SageAttention's (arXiv 2410.02367; fp8: 2411.10958): q and k, less the
    mean key, have one scale per block of the mask and head, v one per channel (`kernels.quant`,
    which says what they need of q, k and v). Weights of e4m3 are rounded as 448 exp(score - running
    maximum), since 448 is the largest e4m3 number; their sum is taken before rounding, and each
    tile's product is added to an fp32 accumulator. lse is of the quantised scores, with the mean
    key's part put back.
    """
    _check_tensors(q, k, v, kv_len)
    _check_mask(q, k, mask)
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}.")
    backends.check_name(BACKENDS, backend)
    scale = checked_scale(scale, q.shape[-1])
    if skip_threshold is not None:
        if precision != "bf16":
            raise ValueError(
                f"skip_threshold goes with precision='bf16', got {precision!r}: leave one out."
            )
        return skipping_attention(
            q, k, v, mask, skip_threshold, scale=scale, kv_len=kv_len, backend=backend
        )[:2]
    blocks = [mask.nk, mask.block_q, mask.block_k]
    return _operator(
        q, k, v, mask.idx, mask.cnt, mask.valid, kv_len, blocks, scale, precision, backend
    )


def skipping_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    skip_threshold: float,
    *,
    scale: float | None = None,
    kv_len: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`block_sparse_attention` that leaves out listed tiles of small weights, and says which.

    A tile is left out, after its scores and before its exponentials, if in every query its largest
    scaled score is below the largest one so far plus ln(skip_threshold), 0 < skip_threshold <= 1
    (BLASST, arXiv 2512.12087; no calibration of the threshold here). Queries past the end have no
    say. A tile is as large as the kernel's, at most a block, and the order of the tiles is the
    kernel's: the reference and Triton go up the list (Triton after the ragged last block), Hopper
    goes down.

    Each key left out has less than skip_threshold times the largest weight: with n of them in a
    row, lse falls by at most n * skip_threshold, and an output moves by at most 2 n skip_threshold
    max|v| from what attention over all listed blocks gives.

    Returns out and lse as there, and skipped, bool `[B, H, nq, nk]`: blocks all of whose tiles were
    left out. `BlockMask.from_keep(mask.keep() & ~skipped)` is what was computed where tiles are
    blocks, and a mask for a later step.
    """
    _check_tensors(q, k, v, kv_len)
    _check_mask(q, k, mask)
    backends.check_name(BACKENDS, backend)
    if not 0 < skip_threshold <= 1:
        raise ValueError(f"skip_threshold must be above 0 and at most 1, got {skip_threshold}.")
    scale = checked_scale(scale, q.shape[-1])
    blocks = [mask.nk, mask.block_q, mask.block_k]
    return _skipping_operator(
        q, k, v, mask.idx, mask.cnt, mask.valid, kv_len, blocks, scale, skip_threshold, backend
    )


def explain(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, precision: str = "bf16"
) -> dict[str, str | None]:
    """For each backend None if it computes this call, else the reason why it does not."""
    call = (q, k, v, mask, precision)
    return {name: backends.why_not(BACKENDS, name, *call) for name in BACKENDS}


def choose_backend(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, precision: str = "bf16"
) -> str:
    """The backend of a call that names none: on a GPU Hopper's kernel, else Triton, if they take
    the call; else gather.

    gather knows "bf16" only: on a GPU the other precisions always go to Triton, whose reason
    against a call is the one that helps.
    """
    call = (q, k, v, mask, precision)
    if q.device.type != "cuda":
        return "gather"
    for name in ("hopper", "triton"):
        if backends.why_not(BACKENDS, name, *call) is None:
            return name
    return "gather" if precision == "bf16" else "triton"


@torch.library.custom_op("vdit_sparse::block_sparse_attention", mutates_args=())
def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    cnt: Tensor,
    valid: Tensor | None,
    kv_len: Tensor | None,
    blocks: list[int],
    scale: float,
    precision: str,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    mask = BlockMask(idx, cnt, *blocks, valid)
    name = backend or choose_backend(q, k, v, mask, precision)
    advice = "Leave `backend` out, or see `explain(q, k, v, mask, precision)` for the others."
    module = backends.load(BACKENDS, name, q, k, v, mask, precision, advice=advice)
    return module.forward(q, k, v, mask, scale, kv_len, precision)


@_operator.register_fake
def _(q, k, v, idx, cnt, valid, kv_len, blocks, scale, precision, backend):
    return empty_outputs(q)


@torch.library.custom_op("vdit_sparse::skipping_attention", mutates_args=())
def _skipping_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    cnt: Tensor,
    valid: Tensor | None,
    kv_len: Tensor | None,
    blocks: list[int],
    scale: float,
    skip_threshold: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    mask = BlockMask(idx, cnt, *blocks, valid)
    name = backend or choose_backend(q, k, v, mask)
    module = backends.load(BACKENDS, name, q, k, v, mask, "bf16")
    if not hasattr(module, "forward_skipping"):
        raise ValueError(
            f"backend {name!r} computes every listed block: leave skip_threshold out, or use "
            "backend='reference', slowly."
        )
    return module.forward_skipping(q, k, v, mask, scale, kv_len, skip_threshold)


@_skipping_operator.register_fake
def _(q, k, v, idx, cnt, valid, kv_len, blocks, scale, skip_threshold, backend):
    skipped = q.new_empty(*q.shape[:2], cnt.shape[2], blocks[0], dtype=torch.bool)
    return *empty_outputs(q), skipped


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, kv_len: Tensor | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or 0 in q.shape or 0 in k.shape:
        raise ValueError(
            f"q must be [B, H, S, D], k and v [B, H, keys, D], not empty; got {shapes}."
        )
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k and v must agree in B, H and D, got {shapes}.")
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(
            "q, k and v must have one dtype of fp16, bf16 and fp32, got "
            f"{q.dtype}, {k.dtype}, {v.dtype}."
        )
    if k.device != q.device or v.device != q.device:
        raise ValueError(f"q, k and v must share a device, got {q.device}, {k.device}, {v.device}.")
    check_last_stride(q=q, k=k, v=v)
    check_inference("block_sparse_attention", q=q, k=k, v=v)
    if kv_len is None:
        return
    if kv_len.dtype != torch.int32 or kv_len.shape != q.shape[:1]:
        raise ValueError(
            f"kv_len must be int32 [{q.shape[0]}], got {kv_len.dtype} {tuple(kv_len.shape)}."
        )
    check_device(kv_len, "kv_len", q, "q")


def _check_mask(q: Tensor, k: Tensor, mask: BlockMask) -> None:
    B, H, S, _ = q.shape
    keys = k.shape[2]
    nq, nk = -(-S // mask.block_q), -(-keys // mask.block_k)
    if mask.nq != nq or mask.nk != nk:
        raise ValueError(
            f"mask has {mask.nq} x {mask.nk} blocks of {mask.block_q} x {mask.block_k} tokens, but "
            f"{S} queries and {keys} keys have {nq} x {nk}: build it for these lengths."
        )
    if mask.idx.shape[0] not in (1, B) or mask.idx.shape[1] not in (1, H):
        raise ValueError(
            f"mask must have 1 or {B} batch rows and 1 or {H} heads like q, got "
            f"{tuple(mask.idx.shape[:2])}."
        )
    if mask.device != q.device:
        raise ValueError(
            f"mask must be on {q.device} like q, got {mask.device}: pass mask.to(q.device)."
        )
