"""Problems for the tests of block-sparse attention."""

from dataclasses import dataclass

import torch

from vdit_sparse.kernels.block_mask import BlockMask, block_pair


@dataclass(frozen=True)
class Case:
    """One problem; lists "shared" by all heads, per "head", or per batch row ("batch")."""

    S: int = 200
    keys: int | None = None  # as many as queries
    D: int = 64
    B: int = 1
    block: int | tuple[int, int] = 128
    lists: str = "head"
    rows: str = "some"  # or "empty": one row without blocks; "full": two rows with all
    layout: str = "BHSD"  # or "BSHD", "fused": slices of one [B, S, 3, H, D]
    valid: bool = False
    kv_len: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32


CASES = {
    "one ragged block": Case(S=63),
    "one whole block": Case(S=128),
    "ragged": Case(),
    "one token over": Case(S=257),
    "whole blocks": Case(S=256),
    "blocks of 64": Case(block=64),
    "whole blocks of 64": Case(S=256, block=64),
    "query blocks of 64": Case(block=(64, 128)),
    "key blocks of 64": Case(block=(128, 64)),
    "more keys": Case(S=100, keys=257),
    "more queries": Case(S=257, keys=63),
    "shared lists": Case(lists="shared", B=2),
    "lists per batch row": Case(lists="batch", B=2),
    "row without blocks": Case(rows="empty", block=64),
    "rows with all blocks": Case(rows="full", block=64),
    "all rows full": Case(rows="all"),
    "masked slots": Case(valid=True, block=64),
    "masked slots in large blocks": Case(valid=True, rows="full"),
    "padded keys": Case(B=3, block=64, kv_len=(0, 77, 200)),
    "padded keys in full rows": Case(B=2, keys=256, rows="full", kv_len=(128, 250)),
    "padded keys and masked slots": Case(B=2, block=64, valid=True, kv_len=(100, 999)),
    "D of 32": Case(D=32),
    "D of 72": Case(D=72),
    "D of 128": Case(D=128),
    "D of 256": Case(D=256),
    "BSHD": Case(B=2, layout="BSHD"),
    "fused": Case(layout="fused", D=32),
    "fp16": Case(dtype=torch.float16),
    "fp16, BSHD": Case(D=128, layout="BSHD", dtype=torch.float16),
    "bf16": Case(dtype=torch.bfloat16),
    "bf16, BSHD": Case(B=2, D=128, layout="BSHD", dtype=torch.bfloat16),
    "bf16, whole blocks of 64": Case(S=256, D=128, block=64, dtype=torch.bfloat16),
    "bf16, padded keys": Case(B=2, D=128, block=64, kv_len=(50, 130), dtype=torch.bfloat16),
    "bf16, masked slots": Case(valid=True, D=128, dtype=torch.bfloat16),
    "bf16, D of 96": Case(D=96, dtype=torch.bfloat16),
}


def make(case: Case, device: torch.device):
    """q, k, v, mask, kv_len."""
    H, keys = 2, case.keys or case.S
    q, k, v = (_tensor(case, H, length) for length in (case.S, keys, keys))
    if case.layout == "fused":
        fused = torch.randn(case.B, case.S, 3, H, case.D, dtype=case.dtype)
        q, k, v = (fused[:, :, i].transpose(1, 2) for i in range(3))
    block_q, block_k = block_pair(case.block)
    nq, nk = -(-case.S // block_q), -(-keys // block_k)
    shape = {"shared": (1, 1), "head": (1, H), "batch": (case.B, H)}[case.lists]
    keep = torch.rand(*shape, nq, nk) < 0.6
    keep[..., torch.arange(nq), torch.arange(nq) % nk] = True
    if case.rows == "empty":
        keep[..., 0, :] = False
    if case.rows == "full":
        keep[..., -1, :] = True
        keep[..., 0, 0, :] = True
    if case.rows == "all":
        keep[...] = True
    valid = None
    if case.valid:
        valid = torch.randint(0, block_k + 1, (nk,), dtype=torch.int32)
    mask = BlockMask.from_keep(keep, case.block, valid=valid).to(device)
    kv_len = None
    if case.kv_len is not None:
        kv_len = torch.tensor(case.kv_len, dtype=torch.int32, device=device)
    return *(_moved(x, device) for x in (q, k, v)), mask, kv_len


def _tensor(case: Case, H: int, length: int) -> torch.Tensor:
    if case.layout == "BSHD":
        return torch.randn(case.B, length, H, case.D, dtype=case.dtype).transpose(1, 2)
    return torch.randn(case.B, H, length, case.D, dtype=case.dtype)


def _moved(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same values and strides on another device."""
    moved = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    return moved.copy_(x)
