"""What the kernels share: where tensors and results lie in memory."""

import torch
from torch import Tensor

from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.block_sparse.tiles import architecture


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


def head_strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of B, H and S; those of dimensions of size 1 mean nothing and are replaced."""
    dense = x.shape[3]
    return tuple(s if n > 1 else dense for s, n in zip(x.stride()[:3], x.shape, strict=False))


def why_no_descriptors(**tensors: Tensor) -> str | None:
    """Why `tensors`, `[B, H, S, D]` of one device and dtype, cannot be read through descriptors
    (TMA), None if they can."""
    first = next(iter(tensors.values()))
    arch = architecture(first.device)
    if not arch.startswith("sm_") or int(arch[3:]) < 90:
        return f"descriptors need NVIDIA compute capability 9.0, this is {arch}"
    D = first.shape[-1]
    if D not in (64, 128) or first.dtype.itemsize != 2:
        return f"descriptors are for D of 64 and 128 in two bytes, got {D} in {first.dtype}"
    for name, x in tensors.items():
        if x.data_ptr() % 16 or any(stride * x.itemsize % 16 for stride in head_strides(x)):
            return f"{name} is not aligned to 16 bytes, strides {x.stride()}"
        if any(stride == 0 for stride in head_strides(x)):
            return f"{name} is expanded, strides {x.stride()}"
    return None


def all_tiles(counts: Tensor, queries: int, mask: BlockMask, rows: int, keys: int) -> Tensor:
    """Which blocks have as many tiles counted as they have, bool, shape of `counts` `[B, H, nq,
    nk]`: tiles of `rows` x `keys`, of which the last query block lacks those past `queries`."""
    left = queries - mask.block_q * torch.arange(mask.nq, device=counts.device)
    tiles = (left.clamp(max=mask.block_q) + rows - 1) // rows * (mask.block_k // keys)
    return counts == tiles[:, None]
