"""Block masks: lists and booleans are the same mask."""

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from vdit_sparse.kernels.block_mask import BlockMask, block_pair
from vdit_sparse.kernels.block_sparse.reference import forward as reference_forward


def random_keep(*shape: int, density: float = 0.4) -> torch.Tensor:
    return torch.rand(shape) < density


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7), (2, 3, 5, 7), (1, 1), (2, 1, 4, 4)])
def test_from_keep_and_back(shape):
    keep = random_keep(*shape)
    mask = BlockMask.from_keep(keep)
    assert torch.equal(mask.keep(), keep[(None,) * (4 - len(shape))])
    assert mask.idx.shape[:3] == mask.cnt.shape == mask.keep().shape[:3]


def test_lists_ascend_and_are_as_wide_as_the_longest():
    keep = random_keep(2, 6, 9)
    keep[0, 0] = True
    keep[1, 2, :] = False
    mask = BlockMask.from_keep(keep, 64)
    longest = int(torch.where(keep.all(-1), 0, keep.sum(-1)).max())
    assert mask.idx.shape[-1] == longest
    for head in range(2):
        for row in range(6):
            listed = mask.idx[0, head, row, : mask.cnt[0, head, row]].tolist()
            if not keep[head, row].all():
                assert listed == keep[head, row].nonzero().flatten().tolist()


def test_full_rows_do_not_widen_the_lists():
    keep = torch.zeros(4, 100, dtype=torch.bool)
    keep[:, 3] = True
    keep[-1] = True
    mask = BlockMask.from_keep(keep)
    assert mask.idx.shape[-1] == 1
    assert mask.cnt[0, 0].tolist() == [1, 1, 1, 100]
    assert torch.equal(mask.keep()[0, 0], keep)


@pytest.mark.parametrize("block", [64, 128, (128, 64)])
@pytest.mark.parametrize(("queries", "keys"), [(1, None), (256, None), (300, 129)])
def test_full_keeps_every_token_in_the_narrowest_lists(queries, keys, block, device):
    mask = BlockMask.full(queries, keys, block, device=device)
    block_q, block_k = block_pair(block)
    keys = keys or queries
    assert (mask.nq, mask.nk) == (-(-queries // block_q), -(-keys // block_k))
    assert (mask.block_q, mask.block_k) == (block_q, block_k)
    assert mask.device.type == device.type and mask.idx.shape[-1] == 1
    assert mask.density() == 1 and mask.token_mask(queries, keys).all()
    assert torch.equal(mask.cnt, BlockMask.from_keep(mask.keep(), block).cnt)


def test_rows_without_blocks():
    mask = BlockMask.from_keep(torch.zeros(2, 3, 4, dtype=torch.bool))
    assert mask.cnt.sum() == 0
    assert not mask.keep().any()
    assert mask.density() == 0


def test_density_counts_all_rows_alike():
    keep = torch.tensor([[[True, True], [True, False]], [[False, False], [True, False]]])
    assert BlockMask.from_keep(keep).density() == 0.5


def test_token_mask_cuts_the_ragged_end_and_invalid_slots():
    keep = torch.tensor([[True, False, True], [True, True, True]])
    valid = torch.tensor([64, 10, 30], dtype=torch.int32)
    mask = BlockMask.from_keep(keep, 64, valid=valid)
    tokens = mask.token_mask(100, 150)[0, 0]
    assert tokens.shape == (100, 150)
    assert tokens[0].sum() == 64 + 22
    assert tokens[99].sum() == 64 + 10 + 22
    assert not tokens[:, 74:128].any()


def test_blocks_may_differ_for_queries_and_keys():
    mask = BlockMask.from_keep(torch.ones(1, 4, dtype=torch.bool), (128, 64))
    assert (mask.block_q, mask.block_k) == (128, 64)
    assert mask.token_mask(128, 256).all()


def test_to_another_device_keeps_everything():
    valid = torch.tensor([5, 6], dtype=torch.int32)
    mask = BlockMask.from_keep(torch.eye(2, dtype=torch.bool), (64, 128), valid=valid)
    moved = mask.to("meta")
    assert moved.idx.device.type == moved.cnt.device.type == moved.valid.device.type == "meta"
    assert (moved.nk, moved.block_q, moved.block_k) == (2, 64, 128)


@pytest.mark.parametrize("with_valid", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(256, 256), (200, 300)])
def test_to_flex_is_the_same_mask(queries, keys, with_valid):
    keep = random_keep(2, -(-queries // 128), -(-keys // 128))
    keep[..., 0] = True
    valid = torch.tensor([100, 128, 20][: keep.shape[-1]], dtype=torch.int32)
    mask = BlockMask.from_keep(keep, valid=valid if with_valid else None)
    q, k, v = (torch.randn(1, 2, n, 16) for n in (queries, keys, keys))
    out = flex_attention(q, k, v, block_mask=mask.to_flex(queries, keys))
    expected, _ = reference_forward(q, k, v, mask, 0.25)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"block_q": 32}, ValueError, r"block_q must be one of \(64, 128\), got 32"),
        ({"block_k": 96}, ValueError, "block_k must be one of"),
        ({"idx": torch.zeros(1, 1, 2, 3)}, TypeError, "must be int32, got torch.float32"),
        ({"cnt": torch.zeros(1, 2, 2, dtype=torch.int32)}, ValueError, r"got \(1, 1, 2, 3\)"),
        ({"valid": torch.zeros(3, dtype=torch.int32)}, ValueError, r"valid must be int32 \[4\]"),
        ({"valid": torch.zeros(4)}, ValueError, r"valid must be int32 \[4\]"),
    ],
)
def test_bad_fields_are_refused(change, error, message):
    lists = {
        "idx": torch.zeros(1, 1, 2, 3, dtype=torch.int32),
        "cnt": torch.zeros(1, 1, 2, dtype=torch.int32),
        "nk": 4,
    }
    with pytest.raises(error, match=message):
        BlockMask(**(lists | change))


@pytest.mark.parametrize("keep", [torch.ones(3, 3), torch.ones(3, dtype=torch.bool)])
def test_keep_must_be_a_bool_square(keep):
    with pytest.raises(ValueError, match="keep must be a bool tensor"):
        BlockMask.from_keep(keep)
