"""How far a kernel may be from exact: as far as torch in the same dtype, and rounding."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.block_sparse.layout import real_keys
from vdit_sparse.kernels.block_sparse.reference import forward as reference_forward

# Scores and sums are fp32; torch's fused CPU kernels use exponentials of 20 bits for 16-bit inputs.
LSE_ERROR = {torch.float32: 2.0**-17, torch.float16: 2.0**-14, torch.bfloat16: 2.0**-14}


def assert_attention(result, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, kv_len=None) -> None:
    """out and lse of block-sparse attention against float64, with torch's own error as the stick.

    On top of torch's error, largest and RMS, there is one rounding of the weights and one of the
    output, half an ulp each, and scores as large as lse in fp32: together (eps + 2 eps32 |lse|)
    times max|v| at most, times rms(out) on average.
    """
    out, lse = result
    assert out.dtype == q.dtype and out.shape == q.shape
    assert lse.dtype == torch.float32 and lse.shape == q.shape[:3]
    scale = q.shape[-1] ** -0.5
    exact, exact_lse = reference_forward(
        *(x.double() for x in (q, k, v)), mask, scale, kv_len, compute=torch.float64
    )
    empty = exact_lse.isinf()
    assert torch.equal(lse.isinf(), empty) and (lse[empty] < 0).all()
    assert (out[empty] == 0).all()
    assert not out.isnan().any() and not lse.isnan().any()
    lse_error = (lse - exact_lse)[~empty].abs()
    if lse_error.numel():
        bound = LSE_ERROR[q.dtype] * max(1.0, float(exact_lse[~empty].abs().max()))
        assert lse_error.max() <= bound, f"lse is off by {lse_error.max():.2e}, bound {bound:.2e}"
    ours = out.double() - exact
    torchs = _same_dtype(q, k, v, mask, kv_len).double() - exact
    size = float(exact_lse[~empty].abs().max()) if lse_error.numel() else 0.0
    rounding = torch.finfo(q.dtype).eps + 2 * torch.finfo(torch.float32).eps * size
    largest = torchs.abs().max() + rounding * v[v.isfinite()].abs().max()
    assert ours.abs().max() <= largest, f"off by {ours.abs().max():.2e}, bound {largest:.2e}"
    rms = torchs.square().mean().sqrt() + rounding * exact.square().mean().sqrt()
    error = ours.square().mean().sqrt()
    assert error <= rms, f"rms error {error:.2e}, bound {rms:.2e}"


def _same_dtype(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, kv_len) -> Tensor:
    """torch's masked attention in the dtype of q; rows without keys are zero."""
    keys = k.shape[2]
    allowed = mask.token_mask(q.shape[2], keys).expand(*q.shape[:3], keys)
    real = real_keys(keys, mask.nk, mask.block_k, mask.valid, kv_len)
    if real is not None:
        allowed = allowed & real[:, None, None, :keys]
        k, v = (torch.where(real[:, None, :keys, None], x, 0) for x in (k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    return torch.where(allowed.any(-1, keepdim=True), out, 0)
