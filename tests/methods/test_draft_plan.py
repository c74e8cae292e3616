"""DraftAttention's plan in attention: order, text, density, what a field may be."""

import json
import math
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

from tests.methods.draft_cases import (
    BARE,
    GRIDS,
    TEXT,
    WHOLE,
    block_of_tokens,
    call_at,
    inputs,
    video_part,
)
from vdit_sparse.grid import Grid
from vdit_sparse.methods.draft import DraftAttention
from vdit_sparse.orders import region_order

each_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
each_block = pytest.mark.parametrize("block", [64, 128])


@pytest.mark.parametrize("select", ["exact", "released"])
@pytest.mark.parametrize("grid", [TEXT, Grid(5, 9, 19, 17), Grid(2, 16, 32, 130)], ids=str)
def test_text_is_kept_whole(grid, select, device):
    q, k, _ = inputs(grid, device)
    method = DraftAttention(density=0.05, select=select, **BARE)
    mask = method.plan(q, k, call_at(grid)).mask
    video = int(block_of_tokens(method, grid).max()) + 1
    assert mask.nk == math.ceil(grid.tokens / 128) > video
    assert mask.keep()[:, :, video:].all()
    assert mask.keep()[..., video:].all()
    assert mask.density() < 1


@each_grid
@each_block
def test_everything_kept_is_dense(grid, block, device):
    q, k, v = inputs(grid, device)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double()).float()
    for select in ("exact", "released"):
        call = call_at(grid)
        out = DraftAttention(density=1.0, select=select, block=block)(q, k, v, call)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        assert float(call.note.density) == 1


@each_grid
@each_block
@pytest.mark.parametrize("fields", [{}, {"select": "released", **BARE}], ids=str)
def test_output_is_dense_attention_over_the_kept_pairs(grid, block, fields, device):
    method = DraftAttention(density=0.2, block=block, **fields)
    q, k, v = inputs(grid, device)
    home = block_of_tokens(method, grid)
    # The last row and column stand for text, whose region is -1.
    kept = F.pad(video_part(method, q, k, grid), (0, 1, 0, 1), value=True)
    seen = kept[:, :, home][..., home].to(device)
    exact = (x.double() for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*exact, attn_mask=seen).float()
    out = method(q, k, v, call_at(grid))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_density_that_is_noted_is_the_masks(device):
    q, k, v = inputs(TEXT, device)
    call = call_at(TEXT)
    DraftAttention(**BARE)(q, k, v, call)
    # 36 of 144 pairs of video, and 25 with the one block of text, of 13 x 13.
    assert float(call.note.density) == pytest.approx((36 + 25) / 169)
    assert not call.note.searched


def test_heads_and_batch_rows_stand_alone(device):
    q, k, v = inputs(TEXT, device, batch=3, heads=3)
    method = DraftAttention()
    out = method(q, k, v, call_at(TEXT))
    mixed = [x[[2, 0, 1]][:, [1, 2, 0]] for x in (q, k, v)]
    torch.testing.assert_close(
        method(*mixed, call_at(TEXT)), out[[2, 0, 1]][:, [1, 2, 0]], atol=1e-5, rtol=1e-5
    )
    keep = method.plan(q, k, call_at(TEXT)).mask.keep().flatten(0, 1)
    assert all(not torch.equal(keep[0], other) for other in keep[1:])


@pytest.mark.parametrize(
    "grid, fields, region",
    [
        (Grid(2, 16, 32), {}, (8, 16)),
        (Grid(2, 32, 16), {}, (16, 8)),
        (Grid(2, 16, 16), {}, (16, 8)),
        (Grid(2, 32, 16), {"block": 64}, (8, 8)),
        (Grid(2, 16, 32), {"pool": (4, 32)}, (4, 32)),
        (Grid(2, 16, 32), {"pool": (2, 32), "block": 64}, (2, 32)),
    ],
)
def test_regions_are_the_blocks_of_the_order(grid, fields, region, device):
    q, k, _ = inputs(grid, device)
    method = DraftAttention(**fields)
    assert method.region(grid) == region
    order = method.plan(q, k, call_at(grid)).order
    assert order is region_order(grid, region, q.device)
    home = block_of_tokens(method, grid)[order.cpu()].view(-1, method.block)
    assert torch.equal(home, torch.arange(len(home))[:, None].expand(-1, method.block))


def test_what_depends_on_geometry_alone_outlives_inference_mode(device):
    grid = Grid(2, 9, 21, 5)
    q, k, v = inputs(grid, device)
    with torch.inference_mode():
        first = DraftAttention()(q, k, v, call_at(grid))
    torch.testing.assert_close(DraftAttention()(q, k, v, call_at(grid)), first)
    assert not DraftAttention().plan(q, k, call_at(grid)).order.is_inference()


def test_first_quarter_of_the_steps_is_dense(device):
    q, k, v = inputs(WHOLE, device)
    calls = [call_at(WHOLE, step) for step in range(4)]
    for call in calls:
        DraftAttention()(q, k, v, call)
    assert [call.note.density is None for call in calls] == [True, False, False, False]


def test_pool_comes_back_from_json():
    method = DraftAttention(pool=(4, 32))
    assert DraftAttention(**json.loads(json.dumps(asdict(method)))) == method
    assert hash(DraftAttention(pool=[4, 32])) == hash(method)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"density": 0}, "density must be a finite number above 0 and at most 1, got 0"),
        ({"density": 1.5}, "density must be"),
        ({"density": math.nan}, "density must be"),
        ({"select": "top"}, r"select must be one of \('exact', 'released'\), got 'top'"),
        ({"force_diagonal": 1}, "force_diagonal must be True or False, got 1"),
        ({"intra_frame": "no"}, "intra_frame must be True or False, got 'no'"),
        ({"sink_frames": -1}, "sink_frames must be an integer of at least 0, got -1"),
        ({"sink_frames": True}, "sink_frames must be"),
        ({"pool": (8, 8)}, r"block = 128 tokens, height \* width = 128, got \(8, 8\)"),
        ({"pool": (8, 16), "block": 64}, "height . width = 64, got"),
        ({"pool": (-8, -16)}, "pool must be"),
        ({"pool": 128}, "pool must be"),
        ({"pool": (2, 4, 16)}, "pool must be"),
        ({"block": 32}, "block must be one of"),
    ],
)
def test_fields_out_of_range_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        DraftAttention(**fields)
