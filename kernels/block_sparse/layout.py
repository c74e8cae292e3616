"""What every backend of `block_sparse_attention` shares: where its results lie in memory."""

import torch
from torch import Tensor


def empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised `out`, shape and memory order of `q`, and `lse`, fp32 `[B, H, S]`.

    A `q` that is a view of `[B, S, H, D]` gives an `out` that is one too, so that neither side of
    the attention pays for a copy. `out` itself is always dense.
    """
    B, H, S, D = q.shape
    if q.stride(1) < q.stride(2):
        out = q.new_empty(B, S, H, D).transpose(1, 2)
    else:
        out = q.new_empty(B, H, S, D)
    return out, q.new_empty(B, H, S, dtype=torch.float32)


def real_keys(
    tokens: int, nk: int, block_k: int, valid: Tensor | None, kv_len: Tensor | None
) -> Tensor | None:
    """Which slots of the `nk * block_k` key slots hold a real key, bool `[B|1, nk * block_k]`;
    None if only the ragged end of the sequence (`tokens` keys) has to be masked."""
    if valid is None and kv_len is None:
        return None
    device = (kv_len if valid is None else valid).device
    slots = torch.arange(nk * block_k, device=device)
    real = (slots < tokens)[None]
    if valid is not None:
        real = real & (slots % block_k < valid.repeat_interleave(block_k))
    if kv_len is not None:
        real = real & (slots < kv_len[:, None])
    return real
