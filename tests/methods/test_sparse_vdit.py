"""Sparse-vDiT: the geometry of its modes, their plan for a layer, and what it reads of a file."""

import warnings
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F

from tests.methods.sparse_vdit_cases import GRID, GRIDS, SEARCHED, calibration, call_at
from vdit_sparse.calibration import CalibrationWarning, load, save
from vdit_sparse.grid import Grid
from vdit_sparse.method import Plan, execute
from vdit_sparse.methods.sparse_vdit import (
    Patterns,
    SparseVDiTAttention,
    mask_of,
    mode_masks,
    order_of,
    stripe_count,
)
from vdit_sparse.orders import axis_order

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
STATIC = Patterns(block=64, stripes="static", every=5)


def attention(path, **fields):
    return SparseVDiTAttention(calibration=path, **fields)


def inputs(grid, device, heads=5, batch=2):
    return torch.randn(3, batch, heads, grid.tokens, 16, device=device)


def exact(q, k, v, mask=None):
    q, k, v = (x.double() for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).float()


def tokens_of(blocks, grid, block):
    visible = blocks.repeat_interleave(block, -2).repeat_interleave(block, -1)
    return visible[..., : grid.tokens, : grid.tokens]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("patterns", [SEARCHED, STATIC, Patterns(block=128, sink_frames=1)])
def test_text_and_its_edge_are_whole_and_no_query_is_blind(grid, patterns):
    masks = mode_masks(grid, patterns)
    edge = grid.video // patterns.block
    assert masks[0].all()
    assert not masks[1].any()
    assert masks[2:4].diagonal(dim1=1, dim2=2).all()
    assert torch.equal(masks[3], masks[3].T)
    columns = torch.zeros(1, stripe_count(grid, patterns), dtype=torch.int32)
    striped = mask_of(torch.tensor([4]), columns, grid, patterns, torch.device("cpu")).keep()
    assert striped.any(-1).all()
    if grid.text:
        assert masks[2:, edge:].all()
        assert masks[2:, :, edge:].all()
        assert striped[..., edge:, :].all()


def test_band_is_as_wide_as_svg_says():
    # Wan 2.1 at 720p, r = 0.3: 75600 (1 - sqrt(0.7)) = 12348 tokens, 96 blocks of 128.
    at = torch.arange(591)
    wan = mode_masks(Grid(21, 45, 80), Patterns(density=0.3))
    assert torch.equal(wan[2], (at[:, None] - at).abs() <= 96)
    assert wan[2].double().mean() == pytest.approx(0.3, abs=0.002)
    # HunyuanVideo at 720p with 256 tokens of text: its rows and columns count.
    hunyuan = mode_masks(Grid(33, 45, 80, 256), Patterns())
    assert torch.equal(hunyuan[2], hunyuan[3])
    assert hunyuan[2:4].double().mean() == pytest.approx(0.25, abs=0.002)


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5, 1.0])
def test_density_is_about_what_was_asked_for(density):
    grid, patterns = Grid(16, 16, 16, 40), Patterns(block=64, density=density)
    masks = mode_masks(grid, patterns)
    columns = torch.arange(stripe_count(grid, patterns))[None]
    stripes = mask_of(torch.tensor([4]), columns, grid, patterns, torch.device("cpu"))
    for share in (masks[2].double().mean(), masks[3].double().mean(), stripes.density()):
        assert share == pytest.approx(density, abs=2 / 64)


def test_sinks_are_for_diagonal_and_stripe_heads():
    grid = Grid(8, 10, 16)
    without, sink = (mode_masks(grid, Patterns(block=64, sink_frames=n)) for n in (0, 1))
    assert sink[2][:, :3].all()
    assert sink[4][:, :3].all()
    assert torch.equal(sink[3], without[3])
    assert torch.equal(sink[2][:, 3:], without[2][:, 3:])


def test_static_stripes_are_the_first_frame_and_each_fifth_block():
    kept = mode_masks(Grid(8, 10, 16), STATIC)[4]
    assert kept.all(0).nonzero().flatten().tolist() == [0, 1, 2, 5, 10, 15]
    assert torch.equal(kept, kept[:1].expand_as(kept))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_searched_stripes_are_the_columns_of_each_head(grid):
    patterns = Patterns(block=64, sink_frames=0)
    columns = torch.tensor([[0, 1], [1, 0]])[:, : stripe_count(grid, patterns)]
    mask = mask_of(torch.tensor([4, 2]), columns, grid, patterns, torch.device("cpu")).keep()[0]
    base = mode_masks(grid, patterns)
    expected = base[4].clone()
    expected[:, columns[0]] = True
    assert torch.equal(mask[0], expected)
    assert torch.equal(mask[1], base[2])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_multi_diagonal_is_the_band_of_permuted_tokens(grid, device):
    q, k, v = inputs(grid, device)
    modes = torch.tensor([3])
    mask, order = mask_of(modes, None, grid, SEARCHED, device), order_of(modes, grid, device)
    assert torch.equal(order, axis_order(grid, "HWF", device))
    out, lse = execute(q, k, v, Plan(mask, order))
    inner, inner_lse = execute(*(x[:, :, order] for x in (q, k, v)), Plan(mask))
    back = order.argsort()
    torch.testing.assert_close(out, inner[:, :, back], rtol=0, atol=0)
    torch.testing.assert_close(lse, inner_lse[:, :, back], rtol=0, atol=0)
    visible = tokens_of(mode_masks(grid, SEARCHED)[3], grid, 64).to(device)[back][:, back]
    torch.testing.assert_close(out, exact(q, k, v, visible), **TOLERANCE)


@pytest.mark.parametrize("patterns", [Patterns(block=64, density=0.3), STATIC])
@pytest.mark.parametrize("grid", [Grid(9, 9, 13, 17), Grid(7, 9, 13)], ids=str)
def test_one_launch_equals_a_loop_over_heads(grid, patterns, device, tmp_path):
    modes = [4, 0, 3, 1, 2, 3]
    path = calibration(tmp_path / "c", [[modes]], patterns, grid=grid)
    q, k, v = inputs(grid, device, heads=6)
    out = attention(path)(q, k, v, call_at(grid, steps=1))
    for head, mode in enumerate(modes):
        columns = torch.arange(stripe_count(grid, patterns))[None]
        columns = None if patterns is STATIC else columns
        here = torch.tensor([mode])
        plan = Plan(mask_of(here, columns, grid, patterns, device), order_of(here, grid, device))
        alone = execute(*(x[:, head : head + 1] for x in (q, k, v)), plan)[0]
        # On a CPU the calls may be cut differently, and sums rounded so.
        exactly = {"rtol": 0, "atol": 0 if device.type == "cuda" else 1e-6}
        torch.testing.assert_close(out[:, head : head + 1], alone, **exactly)
    assert (out[:, 3] == 0).all()
    expected = exact(q, k, v)
    torch.testing.assert_close(out[:, 1], expected[:, 1], **TOLERANCE)
    rows = slice(grid.video, None)
    kept = [0, 1, 2, 4, 5]
    torch.testing.assert_close(out[:, kept, rows], expected[:, kept, rows], **TOLERANCE)


def test_density_is_what_is_computed(tmp_path, device):
    path = calibration(tmp_path / "c", [[[0, 1, 2, 3, 4]]], Patterns(block=64, sink_frames=1))
    q, k, v = inputs(GRID, device)
    call = call_at(steps=1)
    attention(path)(q, k, v, call)
    masks = mode_masks(GRID, Patterns(block=64, sink_frames=1)).double()
    masks[4, :, :4] = 1
    assert float(call.note.density) == pytest.approx(float(masks.mean()))


def test_layers_without_multi_diagonal_heads_move_no_token(tmp_path, device):
    path = calibration(tmp_path / "c", [[[0, 1, 2, 4]], [[3, 3, 3, 3]], [[3, 2, 3, 2]]])
    q, k, _ = inputs(GRID, device, heads=4)
    orders = [attention(path).plan(q, k, call_at(step=s, steps=3)).order for s in range(3)]
    assert orders[0] is None
    assert orders[1].shape == (GRID.tokens,)
    assert orders[2].shape == (4, GRID.tokens)
    assert torch.equal(orders[2][1].cpu(), torch.arange(GRID.tokens))


@pytest.mark.parametrize("refresh", ["each", "once"])
def test_a_plan_lives_as_long_as_its_modes(refresh, tmp_path, device):
    path = calibration(tmp_path / "c", [[[2, 3]], [[2, 3]], [[2, 2]], [[2, 3]]])
    method, memory = attention(path, refresh=refresh), {}
    q, k, _ = inputs(GRID, device, heads=2)
    masks = [method.current_plan(q, k, call_at(step=step, memory=memory)).mask for step in range(4)]
    assert masks[1] is masks[0]
    assert (masks[2] is masks[1]) == (refresh == "once")


def test_steps_map_to_the_same_share_of_the_run(tmp_path, device):
    # Each step has its own number of skipped heads.
    modes = [[[1] * step + [2] * (9 - step)] for step in range(10)]
    method = attention(calibration(tmp_path / "c", modes))
    q, k, _ = inputs(GRID, device, heads=9)

    def skipped(step, steps):
        mask = method.plan(q, k, call_at(step=step, steps=steps)).mask
        return int((mask.cnt == 0).all(-1).sum())

    assert [skipped(step, 10) for step in range(10)] == list(range(10))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        assert [skipped(step, 4) for step in range(4)] == [0, 3, 6, 9]
        assert [skipped(step, 19) for step in (0, 2, 18)] == [0, 1, 9]


def test_a_step_of_the_other_expert_takes_the_nearest_searched_one(tmp_path, device):
    modes = [[[-1, -1]], [[-1, -1]], [[1, 0]], [[0, 1]]]
    method = attention(calibration(tmp_path / "c", modes, expert="transformer_2"))
    q, k, v = inputs(GRID, device, heads=2)
    for step, zero in ((0, 0), (1, 0), (2, 0), (3, 1)):
        out = method(q, k, v, call_at(step=step, expert="transformer_2"))
        assert (out[:, zero] == 0).all()
        assert (out[:, 1 - zero] != 0).any()
    with pytest.raises(ValueError, match="has no 'modes' of 'transformer'"):
        method(q, k, v, call_at())


def test_what_does_not_fit_raises(tmp_path, device):
    q, k, v = inputs(GRID, device, heads=2)
    with pytest.raises(ValueError, match="needs a calibration"):
        SparseVDiTAttention()(q, k, v, call_at())
    path = calibration(tmp_path / "c", [[[0, 1]]] * 4)
    with pytest.raises(ValueError, match="grid"):
        attention(path)(*inputs(Grid(4, 8, 8), device, heads=2), call_at(Grid(4, 8, 8)))
    with pytest.raises(ValueError, match="block=64.*block=128"):
        attention(path, block=128)(q, k, v, call_at())
    with pytest.raises(ValueError, match="with 2 heads, but the model has 3 heads"):
        attention(path)(*inputs(GRID, device, heads=3), call_at())
    path = calibration(tmp_path / "c2", [[[-1, -1]]] * 4)
    with pytest.raises(ValueError, match="0 searched steps of layer 0"):
        attention(path)(q, k, v, call_at())
    path = tmp_path / "c3"
    found = load(calibration(path, [[[0, 1]]] * 4))
    save(replace(found, fields={"block": 64}))
    with pytest.raises(ValueError, match="lacks the field density, stripes, every, sink_frames"):
        attention(str(path))(q, k, v, call_at())
    path = calibration(tmp_path / "c4", [[[0, 1]]])
    with pytest.warns(CalibrationWarning, match="steps"):
        attention(path)(q, k, v, call_at())


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"block": 32}, "block must be one of"),
        ({"density": 0}, "density must be"),
        ({"density": 1.5}, "density must be"),
        ({"stripes": "none"}, "stripes must be one of"),
        ({"every": 0}, "every must be an integer of at least 1, got 0"),
        ({"sink_frames": 0.5}, "sink_frames must be an integer of at least 0, got 0.5"),
    ],
)
def test_patterns_out_of_range_raise(changed, message):
    assert set(changed) <= {field.name for field in fields(Patterns)}
    with pytest.raises(ValueError, match=message):
        Patterns(**changed)
