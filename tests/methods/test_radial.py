"""Radial's own laws: growth, symmetry, text, what changes its mask, and its plan in attention."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.methods.radial_cases import ODD_GRIDS, density
from vdit_sparse.grid import Grid
from vdit_sparse.kernels.block_sparse import block_sparse_attention
from vdit_sparse.method import Call
from vdit_sparse.methods.radial import RadialAttention


def test_released_rule_leaves_no_row_empty():
    keep = RadialAttention(align="released", block=64, sink_frames=0).keep(Grid(8, 10, 12))
    assert keep.any(-1).all()


def test_block_density_halves_with_each_octave():
    method = RadialAttention(decay=1.0, sink_frames=0)
    tiles = method.keep(Grid(72, 48, 80)).view(72, 30, 72, 30).double().mean((1, 3))
    octaves = {1: 1.0, 3: 0.4867, 7: 0.2778, 15: 0.16, 31: 0.0978}
    for i in range(72):
        for j in range(72):
            distance = abs(i - j)
            period = 1 if distance < 32 else 2 if distance < 64 else 4
            expected = next((x for d, x in octaves.items() if distance <= d), 0.0978)
            assert tiles[i, j] == pytest.approx(0 if distance % period else expected, abs=5e-5), (
                distance
            )


@pytest.mark.parametrize("grid", [Grid(20, 16, 24), Grid(20, 13, 21), Grid(40, 5, 9)], ids=str)
@pytest.mark.parametrize("align", ["straddle", "released"])
def test_larger_decay_keeps_more(grid, align):
    masks = [
        RadialAttention(decay=decay, align=align, block=64).keep(grid)
        for decay in (0.1, 0.5, 1.0, 2.0, 8.0)
    ]
    for fewer, more in zip(masks, masks[1:], strict=False):
        assert not (fewer & ~more).any() or align == "released"
        assert density(fewer) <= density(more)


def test_decay_saturates_where_the_band_is_one_block_thin():
    grid = Grid(18, 48, 80)
    masks = [RadialAttention(decay=decay).keep(grid) for decay in (0.01, 0.228, 0.229)]
    assert torch.equal(masks[0], masks[1])
    assert density(masks[2]) > density(masks[1])


@pytest.mark.parametrize("grid", [*ODD_GRIDS, Grid(16, 45, 80)], ids=str)
@pytest.mark.parametrize("sink_frames", [0, 1, 3])
def test_diagonal_symmetry_and_sink(grid, sink_frames):
    keep = RadialAttention(sink_frames=sink_frames).keep(grid)
    without = RadialAttention(sink_frames=0).keep(grid)
    assert keep.diagonal().all()
    assert torch.equal(without, without.T)
    sink = math.ceil(min(sink_frames, grid.frames) * grid.frame_tokens / 128)
    assert keep[:, :sink].all()
    assert torch.equal(keep[:, sink:], without[:, sink:])


def test_cost_grows_as_n_log_n():
    ratios = []
    for frames, expected in ((32, 2.905), (64, 3.26), (128, 3.55), (256, 3.78)):
        keep = RadialAttention(decay=1.0, sink_frames=0).keep(Grid(frames, 32, 32))
        ratios.append(density(keep) * frames / math.log2(frames))
        assert ratios[-1] == pytest.approx(expected, abs=0.005)
    assert max(ratios) / min(ratios) < 1.4


@pytest.mark.parametrize("align", ["straddle", "released"])
@pytest.mark.parametrize("text", [1, 17, 128, 300])
@pytest.mark.parametrize("height, width", [(16, 16), (10, 13)])
def test_blocks_that_touch_text_are_kept_whole(height, width, text, align):
    grid = Grid(16, height, width, text)
    keep = RadialAttention(align=align).keep(grid)
    edge = grid.video // 128
    assert keep[edge:].all()
    assert keep[:, edge:].all()
    video = RadialAttention(align=align).keep(replace(grid, text=0))
    assert torch.equal(keep[:edge, :edge], video[:edge, :edge])
    assert not keep.all()


@pytest.mark.parametrize("grid", [Grid(1, 16, 28), Grid(2, 45, 80), Grid(2, 9, 13, 17)], ids=str)
def test_two_frames_are_dense(grid):
    assert RadialAttention().keep(grid).all()


@pytest.mark.parametrize("grid", ODD_GRIDS, ids=str)
def test_huge_decay_without_decimation_is_dense(grid):
    assert RadialAttention(decay=1e9, decimate=False).keep(grid).all()


def plan_of(method, grid):
    q = torch.zeros(1, 1, grid.tokens, 1)
    return method.plan(q, q, Call(grid, layer=0, layers=1, step=0, steps=None, memory={}))


@pytest.mark.parametrize(
    "grid, fields",
    [
        (Grid(17, 16, 16), {}),
        (Grid(16, 16, 8), {}),
        (Grid(16, 16, 16, 17), {}),
        (Grid(16, 16, 16), {"decay": 1.0}),
        (Grid(16, 16, 16), {"d1": "half"}),
        (Grid(16, 16, 16), {"sink_frames": 0}),
        (Grid(16, 16, 16), {"decimate": False}),
        (Grid(16, 16, 16), {"block": 128}),
    ],
)
def test_every_argument_changes_the_mask(grid, fields):
    usual = plan_of(RadialAttention(block=64), Grid(16, 16, 16)).mask
    other = plan_of(replace(RadialAttention(block=64), **fields), grid).mask
    assert usual.keep().shape != other.keep().shape or not torch.equal(usual.keep(), other.keep())


def test_align_changes_the_mask_of_unaligned_frames_only():
    for grid, equal in ((Grid(16, 16, 16), True), (Grid(16, 10, 13), False)):
        plans = [plan_of(RadialAttention(align=align), grid) for align in ("straddle", "released")]
        assert torch.equal(*(plan.mask.keep() for plan in plans)) == equal


def test_plan_is_built_once_and_outlives_inference_mode():
    grid = Grid(5, 11, 13)
    with torch.inference_mode():
        first = plan_of(RadialAttention(decay=0.3), grid)
    assert plan_of(RadialAttention(decay=0.3), grid).mask is first.mask
    assert not first.mask.idx.is_inference()


def test_plan_is_shared_by_heads_and_lies_on_the_device_of_q(device):
    grid = Grid(7, 16, 28)
    q = torch.zeros(2, 3, grid.tokens, 8, device=device)
    mask = RadialAttention().plan(q, q, Call(grid, 0, 1, 0, None, {})).mask
    assert mask.idx.shape[:2] == (1, 1)
    assert mask.idx.device == mask.cnt.device == q.device
    assert torch.equal(mask.keep()[0, 0].cpu(), RadialAttention().keep(grid))
    assert 0 < mask.density() < 1


@pytest.mark.parametrize("backend", ["reference", "gather"])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("grid", [Grid(9, 9, 13, 17), Grid(8, 10, 13)], ids=str)
def test_sparse_output_equals_dense_attention_with_the_expanded_mask(grid, block, backend, device):
    method = RadialAttention(block=block, sink_frames=0)
    q, k, v = torch.randn(3, 2, 2, grid.tokens, 32, device=device)
    visible = method.keep(grid).repeat_interleave(block, 0).repeat_interleave(block, 1)
    visible = visible[: grid.tokens, : grid.tokens].to(device)
    assert not visible.all()
    mask = method.plan(q, k, Call(grid, 0, 1, 0, None, {})).mask
    out, _ = block_sparse_attention(q, k, v, mask, backend=backend)
    exact = [x.double() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*exact, attn_mask=visible).float()
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"decay": 0}, "decay must be a finite number above 0, got 0"),
        ({"decay": -1.0}, "decay must be"),
        ({"decay": math.inf}, "decay must be"),
        ({"decay": math.nan}, "decay must be"),
        ({"decay": "0.2"}, "decay must be"),
        ({"d1": "third"}, r"d1 must be one of \('full', 'half'\), got 'third'"),
        ({"align": "pad"}, "align must be one of"),
        ({"sink_frames": -1}, "sink_frames must be an integer of at least 0, got -1"),
        ({"sink_frames": 1.5}, "sink_frames must be an integer of at least 0, got 1.5"),
        ({"decimate": "no"}, "decimate must be True or False, got 'no'"),
        ({"block": 32}, "block must be one of"),
    ],
)
def test_fields_out_of_range_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        RadialAttention(**fields)
