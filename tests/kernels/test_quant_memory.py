"""Peak memory of sparse attention on a GPU: no more than dense attention takes, but for the 8-bit
copies and those in another order."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.block_sparse import block_sparse_attention, explain
from vdit_sparse.method import Plan, execute

pytestmark = pytest.mark.gpu
H, S, D, BLOCK = 8, 16_100, 128, 128
SIZE = 2 * H * S * D  # bytes of one of q, k, v and the output
# int8 q and k, and e4m3 v, are half of that each.
COPIES = {"bf16": 0, "int8_bf16": SIZE, "int8_fp8": SIZE * 3 // 2}
# lse, scales, sums over blocks, what stands in a padded block, and the places of an order.
SMALL = SIZE // 8


def problem(device: torch.device) -> tuple[list[Tensor], BlockMask]:
    q_k_v = [torch.randn(1, S, H, D, device=device, dtype=torch.bfloat16) for _ in range(3)]
    keep = torch.rand(H, -(-S // BLOCK), -(-S // BLOCK), device=device) < 0.25
    return [x.transpose(1, 2) for x in q_k_v], BlockMask.from_keep(keep, BLOCK)


def peak(call) -> int:
    """Bytes that a call takes at most, on top of what was there; nothing of it is the first."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("backend", ["hopper", "triton"])
@pytest.mark.parametrize("precision", COPIES)
def test_attention_takes_its_output_and_its_copies(precision, backend, device):
    tensors, mask = problem(device)
    reason = explain(*tensors, mask, precision)[backend]
    if reason is not None:
        assert "self-check failed" not in reason, reason
        pytest.skip(reason)
    dense = peak(lambda: scaled_dot_product_attention(*tensors))
    how = {"precision": precision, "backend": backend}
    sparse = peak(lambda: block_sparse_attention(*tensors, mask, **how))
    assert SIZE <= sparse <= dense + COPIES[precision] + SMALL


@pytest.mark.parametrize("precision", COPIES)
def test_an_order_takes_three_copies_more(precision, device):
    tensors, mask = problem(device)
    order = torch.stack([torch.randperm(S, device=device) for _ in range(H)])
    dense = peak(lambda: scaled_dot_product_attention(*tensors))
    sparse = peak(lambda: execute(*tensors, Plan(mask, order), precision=precision))
    assert 4 * SIZE <= sparse <= dense + 3 * SIZE + COPIES[precision] + SMALL
