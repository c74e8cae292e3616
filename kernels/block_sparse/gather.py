"""Block-sparse attention in plain torch: gathers each query block's keys and calls dense attention.

The path of CPU and MPS, and of GPUs that Triton does not know. Query blocks with equally many key
blocks go through one call, in chunks of bounded size; rows that keep everything read k and v where
they lie.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.block_sparse.layout import empty_outputs, real_keys

# Bytes of gathered keys and values held at once. On a CPU they should stay in its caches between
# being gathered and being read; on two cores 2 to 4 MiB in all are the fastest of 2 to 80, 8 costs
# a few per cent more there but half the calls, of which each waits for the slowest thread.
CPU_BUDGET_PER_THREAD = 4 * 2**20
DEVICE_BUDGET = 256 * 2**20


def supports(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, precision: str) -> str | None:
    """None if this backend computes the call, else the reason why it does not."""
    if precision != "bf16":
        return (
            f"plain torch has no fast {precision}; use precision='bf16', or backend='reference' "
            "for the same rounding, slowly"
        )
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float,
    kv_len: Tensor | None = None,
    precision: str = "bf16",
) -> tuple[Tensor, Tensor]:
    """See `block_sparse_attention`; "bf16" is the only precision that `supports` lets through."""
    B, H, S, D = q.shape
    k, v, bias = _masked_keys(k, v, mask, kv_len)
    queries = pad(q, (0, 0, 0, mask.nq * mask.block_q - S)).unflatten(2, (mask.nq, mask.block_q))
    results = queries.new_zeros(queries.shape), _lse_of_nothing(queries)
    dense = _dense_rows(mask, _is_fused(q, bias))
    if dense.numel():
        _attend_dense(queries, (k, v, bias), results, dense, scale)
    if dense.numel() < mask.nq:
        blocks = _Blocks.build((k, v, bias), mask)
        _attend_listed(queries, blocks, results, list(_groups(mask, dense, (B, H), blocks)), scale)
    out, lse = empty_outputs(q)
    out.copy_(results[0].flatten(2, 3)[:, :, :S])
    lse.copy_(results[1].flatten(2, 3)[:, :, :S])
    return out, lse


def _lse_of_nothing(queries: Tensor) -> Tensor:
    """What a row without keys has, -inf, fp32 `[B, H, nq, block_q]`."""
    return torch.full(queries.shape[:4], -torch.inf, dtype=torch.float32, device=queries.device)


def _masked_keys(
    k: Tensor, v: Tensor, mask: BlockMask, kv_len: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """k, v and an additive bias `[B, keys]` of 0 and -inf, None if every key is real.

    Masked keys get weight 0, but 0 * nan is nan: so whatever stands there becomes zero.
    """
    B, _, keys, _ = k.shape
    real = real_keys(keys, mask.nk, mask.block_k, mask.valid, kv_len)
    if real is None or bool(real[:, :keys].all()):
        return k, v, None
    real = real[:, :keys].expand(B, keys)
    k, v = (x.masked_fill(~real[:, None, :, None], 0) for x in (k, v))
    bias = torch.zeros(B, keys, dtype=k.dtype, device=k.device).masked_fill_(~real, -torch.inf)
    return k, v, bias


def _dense_rows(mask: BlockMask, fused: bool) -> Tensor:
    """Query blocks that keep everything in all heads and batch rows, where a fused dense attention
    can take them without holding their scores."""
    everywhere = (mask.cnt == mask.nk).flatten(0, 1).all(0)
    return (everywhere & fused).nonzero().squeeze(1)


def _attend_dense(queries, keys, results, rows: Tensor, scale: float) -> None:
    """All of `rows` against k and v where they lie, into `results`."""
    k, v, bias = keys
    block_q = queries.shape[3]
    q = queries.index_select(2, rows).flatten(2, 3)
    out, lse = _attend(q, k, v, bias, scale)
    results[0][:, :, rows] = out.unflatten(2, (-1, block_q))
    results[1][:, :, rows] = lse.unflatten(2, (-1, block_q))


@dataclass(frozen=True)
class _Blocks:
    """Keys and values as rows of whole blocks; the ragged end is zero."""

    k: Tensor  # [B * H * nk, block_k * D]
    v: Tensor
    bias: Tensor | None  # [B * H * nk, block_k]
    nk: int
    tail: int  # slots past the end of the sequence in the last key block

    @classmethod
    def build(cls, keys, mask: BlockMask) -> "_Blocks":
        k, v, bias = keys
        heads = k.shape[1]
        tail = mask.nk * mask.block_k - k.shape[2]
        k, v = (pad(x, (0, 0, 0, tail)).reshape(-1, mask.block_k * k.shape[3]) for x in (k, v))
        if bias is not None:
            bias = pad(bias, (0, tail))[:, None].expand(-1, heads, -1)
            bias = bias.reshape(-1, mask.block_k)
        return cls(k, v, bias, mask.nk, tail)


def _groups(
    mask: BlockMask, dense: Tensor, heads: tuple[int, int], blocks: _Blocks
) -> Iterator[tuple[Tensor, Tensor]]:
    """Units (batch row, head, query block) that one attention call can take together: flat unit
    numbers `[u]` and their rows of `blocks.k` `[u, n]`, in chunks that keep to the budget.

    Equal are the number of key blocks and whether the ragged last one is among them.
    """
    cnt = mask.cnt.expand(*heads, mask.nq).clone()
    cnt[:, :, dense] = 0
    idx = mask.idx.expand(*heads, mask.nq, -1)
    last = idx.gather(-1, (cnt - 1).clamp(0, idx.shape[-1] - 1).long()[..., None]).squeeze(-1)
    ragged = ((cnt == mask.nk) | (last == mask.nk - 1)) & (cnt > 0)
    kinds = torch.where(cnt > 0, 2 * cnt + ragged if blocks.tail else 2 * cnt, 0)
    for kind in kinds.unique().tolist():
        n = kind // 2
        if n == 0:
            continue
        b, h, row = (kinds == kind).nonzero(as_tuple=True)
        lists = torch.arange(n, device=idx.device) if n == mask.nk else idx[b, h, row, :n].long()
        head = b * heads[1] + h
        units = head * mask.nq + row
        lists = head[:, None] * mask.nk + lists
        yield from zip(*(x.split(_chunk(blocks, n)) for x in (units, lists)), strict=True)


def _chunk(blocks: _Blocks, n: int) -> int:
    """How many units with `n` key blocks each go into one call."""
    budget = DEVICE_BUDGET
    if blocks.k.device.type == "cpu":
        budget = CPU_BUDGET_PER_THREAD * torch.get_num_threads()
    return max(1, budget // (2 * n * blocks.k.shape[1] * blocks.k.itemsize))


def _attend_listed(queries, blocks: _Blocks, results, groups, scale: float) -> None:
    """All of `groups`, into `results`: queries sorted once before, outputs placed once after."""
    if not groups:
        return
    order = torch.cat([units for units, _ in groups])
    chunks = queries.flatten(0, 2)[order].split([len(units) for units, _ in groups])
    parts = [
        _attend_gathered(q[:, None], blocks, lists, scale)
        for q, (_, lists) in zip(chunks, groups, strict=True)
    ]
    for result, pieces in zip(results, zip(*parts, strict=True), strict=True):
        result.flatten(0, 2)[order] = torch.cat(pieces)[:, 0]


def _attend_gathered(
    q: Tensor, blocks: _Blocks, lists: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One call over units, q `[u, 1, block_q, D]`, each with its own gathered keys."""
    u, flat = len(lists), lists.flatten()
    k, v = (x.index_select(0, flat).view(u, 1, -1, q.shape[3]) for x in (blocks.k, blocks.v))
    bias = None if blocks.bias is None else blocks.bias.index_select(0, flat).view(u, -1)
    if blocks.tail and int(lists[0, -1]) % blocks.nk == blocks.nk - 1:
        k, v = k[:, :, : -blocks.tail], v[:, :, : -blocks.tail]
        bias = None if bias is None else bias[:, : -blocks.tail]
    return _attend(q, k, v, bias, scale)


def _is_fused(q: Tensor, bias: Tensor | None) -> bool:
    """Whether `_attend` runs a fused kernel, or else holds the scores in memory."""
    if q.device.type == "cpu":
        return True
    # On ROCm the memory-efficient kernel is not in every build; with a bias it has alignment rules.
    cuda = q.device.type == "cuda" and torch.version.hip is None
    return cuda and bias is None and q.dtype != torch.float32 and q.shape[-1] % 8 == 0


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Dense attention, q `[N, H, M, D]`, k and v `[N, H, K, D]`, bias `[N, K]`; out and lse."""
    additive = None if bias is None else bias[:, None, None]
    if not _is_fused(q, bias):
        out, lse = _attend_unfused(q, k, v, additive, scale)
    elif q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=additive, scale=scale
        )
    else:
        out, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, scale=scale
        )
        lse = lse[..., : q.shape[2]]
    if bias is not None:
        empty = bias.isinf().all(-1)[:, None, None]
        out = out.masked_fill(empty[..., None], 0)
        lse = lse.masked_fill(empty, -torch.inf)
    return out, lse


def _attend_unfused(
    q: Tensor, k: Tensor, v: Tensor, additive: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    scores = q.float() @ k.float().transpose(-1, -2) * scale
    if additive is not None:
        scores = scores + additive
    return (scores.softmax(-1) @ v.float()).to(q.dtype), scores.logsumexp(-1)
