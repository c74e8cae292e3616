"""`BlockMask`: which key blocks each query block visits, as index lists."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

BLOCK_SIZES = (64, 128)


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Lists of kept key blocks for each query block, one list per (batch, head, query block).

    idx: int32 `[B|1, H|1, nq, cap]`, the kept key blocks in ascending order; entries from `cnt` on
        are never read.
    cnt: int32 `[B|1, H|1, nq]`, how many are kept. `cnt == nk` means all of them and `idx` is then
        not read, so that dense rows (text) do not widen `cap`.
    nk: number of key blocks.
    block_q, block_k: tokens of a query and of a key block, each 64 or 128. The last block of a
        sequence may be ragged: the kernels mask what lies past the end.
    valid: int32 `[nk]` or None: real tokens at the start of each key block; the rest of the block
        is masked (for layouts that pad inside the sequence).

    A size of 1 in the first two dimensions is shared by all batch rows or heads.
    """

    idx: Tensor
    cnt: Tensor
    nk: int
    block_q: int = 128
    block_k: int = 128
    valid: Tensor | None = None

    def __post_init__(self):
        for name, size in (("block_q", self.block_q), ("block_k", self.block_k)):
            if size not in BLOCK_SIZES:
                raise ValueError(f"{name} must be one of {BLOCK_SIZES}, got {size}.")
        if self.idx.dtype != torch.int32 or self.cnt.dtype != torch.int32:
            raise TypeError(
                f"idx and cnt must be int32, got {self.idx.dtype} and {self.cnt.dtype}."
            )
        if self.idx.ndim != 4 or self.cnt.shape != self.idx.shape[:3]:
            raise ValueError(
                "idx must be [B|1, H|1, nq, cap] and cnt [B|1, H|1, nq], got "
                f"{tuple(self.idx.shape)} and {tuple(self.cnt.shape)}."
            )
        if self.valid is not None and (
            self.valid.shape != (self.nk,) or self.valid.dtype != torch.int32
        ):
            raise ValueError(
                f"valid must be int32 [{self.nk}], got "
                f"{self.valid.dtype} {tuple(self.valid.shape)}."
            )

    @property
    def nq(self) -> int:
        """Number of query blocks."""
        return self.idx.shape[2]

    @property
    def device(self) -> torch.device:
        return self.idx.device

    @classmethod
    def from_keep(
        cls, keep: Tensor, block: int | tuple[int, int] = 128, *, valid: Tensor | None = None
    ) -> "BlockMask":
        """Lists of the True entries of `keep`, bool `[..., nq, nk]` with up to two leading
        dimensions (batch, head); `block` is one size or (query block, key block).

        Reads one number back from the device (the widest list), so it belongs where plans are
        built, not into a compiled graph.
        """
        if keep.dtype != torch.bool or not 2 <= keep.ndim <= 4:
            raise ValueError(
                "keep must be a bool tensor [nq, nk], [H, nq, nk] or [B, H, nq, nk], got "
                f"{keep.dtype} {tuple(keep.shape)}."
            )
        # `select` imports this module.
        from vdit_sparse.kernels.select import ascending_lists

        keep = keep[(None,) * (4 - keep.ndim)]
        nk = keep.shape[-1]
        cnt = keep.sum(-1, dtype=torch.int32)
        cap = max(int(torch.where(cnt < nk, cnt, 0).max()), 1)
        return cls(ascending_lists(keep, cap), cnt, nk, *block_pair(block), valid)

    @classmethod
    def full(
        cls,
        queries: int,
        keys: int | None = None,
        block: int | tuple[int, int] = 128,
        *,
        device: torch.device | str | None = None,
    ) -> "BlockMask":
        """The mask that keeps everything, for sequences of `queries` and `keys` tokens (default: as
        many); `block` is one size or (query block, key block)."""
        block_q, block_k = block_pair(block)
        nq, nk = -(-queries // block_q), -(-(queries if keys is None else keys) // block_k)
        cnt = torch.full((1, 1, nq), nk, dtype=torch.int32, device=device)
        return cls(torch.zeros_like(cnt)[..., None], cnt, nk, block_q, block_k)

    def keep(self) -> Tensor:
        """The same mask as bool `[B|1, H|1, nq, nk]`."""
        listed = torch.arange(self.idx.shape[-1], device=self.device) < self.cnt[..., None]
        full = self.cnt == self.nk
        keep = torch.zeros(*self.cnt.shape, self.nk, dtype=torch.int32, device=self.device)
        columns = torch.where(listed & ~full[..., None], self.idx, 0).long()
        keep.scatter_add_(-1, columns, (listed & ~full[..., None]).int())
        return (keep > 0) | full[..., None]

    def token_mask(self, queries: int, keys: int) -> Tensor:
        """The mask of single tokens, bool `[B|1, H|1, queries, keys]`, for references and plots."""
        rows = torch.arange(queries, device=self.device) // self.block_q
        columns = torch.arange(keys, device=self.device)
        keep = self.keep()[:, :, rows][..., columns // self.block_k]
        if self.valid is not None:
            keep = keep & (columns % self.block_k < self.valid[columns // self.block_k])
        return keep

    def density(self) -> float:
        """Kept share of key blocks, 0 to 1, over all batch rows, heads and query blocks."""
        return float(self.kept_share)

    @cached_property
    def kept_share(self) -> Tensor:
        """`density()` as a 0-dim tensor, so that reading it waits for nothing."""
        kept = self.cnt.sum(dtype=torch.float64)
        # By a tensor: a GPU divides by a number as times 1 / n, and a full mask would have 0.99...
        return kept / torch.full_like(kept, self.cnt.numel() * self.nk)

    def to(self, device: torch.device | str) -> "BlockMask":
        """The same mask on another device."""
        valid = None if self.valid is None else self.valid.to(device)
        return replace(self, idx=self.idx.to(device), cnt=self.cnt.to(device), valid=valid)

    def to_flex(self, queries: int, keys: int):
        """The same mask as a `torch.nn.attention.flex_attention.BlockMask` for sequences of
        `queries` and `keys` tokens. Ragged ends and `valid` become partial blocks."""
        from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

        keep = self.keep()
        real = torch.full((self.nk,), self.block_k, dtype=torch.int32, device=self.device)
        real[-1] = keys - (self.nk - 1) * self.block_k
        if self.valid is not None:
            real = torch.minimum(real, self.valid)
        whole = keep & (real == self.block_k)
        partial = keep & ~whole
        lists = [_all_columns(part) for part in (partial, whole)]
        block_q, block_k = self.block_q, self.block_k
        batch_step, head_step = (int(size > 1) for size in keep.shape[:2])

        # The compiled kernel asks this in partial blocks only, the uncompiled one everywhere.
        def visible(b, h, q_index, k_index):
            k_block = k_index // block_k
            kept = keep[b * batch_step, h * head_step, q_index // block_q, k_block]
            return kept & (k_index % block_k < real[k_block])

        return FlexBlockMask.from_kv_blocks(
            *lists[0],
            *lists[1],
            BLOCK_SIZE=(self.block_q, self.block_k),
            mask_mod=visible,
            seq_lengths=(queries, keys),
        )


def block_pair(block: int | tuple[int, int]) -> tuple[int, int]:
    """(query block, key block), in tokens, of one size for both or of such a pair."""
    return (block, block) if isinstance(block, int) else tuple(block)


def _all_columns(keep: Tensor) -> tuple[Tensor, Tensor]:
    """(counts, indices of full width) in the order that FlexAttention takes them."""
    order = torch.argsort((~keep).to(torch.uint8), dim=-1, stable=True)
    return keep.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()
