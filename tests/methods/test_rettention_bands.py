"""The bands of Re-ttention: densities, symmetry, text, rounding to blocks and tiles."""

import pytest
import torch

from tests.methods.test_contract import exact
from vdit_sparse import bands
from vdit_sparse.bands import (
    MASKS,
    REGIONS,
    band_attention,
    band_blocks,
    band_density,
    band_plan,
    band_tiles,
    half_width,
)
from vdit_sparse.grid import Grid
from vdit_sparse.kernels.reorder import inverse

CPU = torch.device("cpu")
GRIDS = [
    Grid(1, 16, 28),
    Grid(1, 9, 13, 17),
    Grid(3, 9, 13),
    Grid(3, 9, 13, 17),
    Grid(20, 2, 9, 17),
    Grid(2, 16, 16, 64),
]
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
each_block = pytest.mark.parametrize("block", [64, 128])


def visible(plan, tokens):
    """Which key each query sees in the order of the sequence, bool `[tokens, tokens]`."""
    if plan.order is None:
        return plan.mask.token_mask(tokens, tokens)[0, 0]
    slots, place = plan.order.shape[-1], inverse(plan.order, tokens)
    return plan.mask.token_mask(slots, slots)[0, 0][place][:, place]


def token_band(grid, half):
    place = torch.arange(grid.video) % grid.frame_tokens
    keep = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    keep[: grid.video, : grid.video] = (place[:, None] - place).abs() <= half
    return keep


@pytest.mark.parametrize(
    ("grid", "width", "density"),
    [(Grid(1, 64, 64), 129, 0.03125), (Grid(13, 30, 45, 226), 43, 0.0561)],
)
def test_densities_of_the_sheet(grid, width, density):
    half = half_width(grid, 0.03125)
    assert 2 * half + 1 == width
    assert band_density(grid, half) == pytest.approx(density, abs=5e-5)


@each_grid
@pytest.mark.parametrize("share", [0.01, 0.125, 0.5, 0.999, 1])
def test_token_density_is_counted_exactly(grid, share):
    half = half_width(grid, share)
    band = token_band(grid, half)
    assert band_density(grid, half) == pytest.approx(band.double().mean().item(), abs=1e-12)
    row = band[: grid.video, : grid.frame_tokens][grid.frame_tokens // 2]
    assert row.sum() == min(2 * half + 1, grid.frame_tokens)
    assert band.all() == (share == 1)


@each_grid
@each_block
@pytest.mark.parametrize("mask", MASKS)
def test_masks_are_symmetric_with_a_diagonal_and_whole_text(grid, block, mask):
    plan = band_plan(grid, mask, 0.125, block, CPU)
    keep = plan.mask.keep()[0, 0]
    assert torch.equal(keep, keep.T) and keep.diagonal().all()
    seen = visible(plan, grid.tokens)
    assert seen[grid.video :].all() and seen[:, grid.video :].all()
    assert seen.diagonal().all()


@each_grid
@each_block
def test_token_plan_covers_the_band_and_nothing_else(grid, block):
    half = half_width(grid, 0.125)
    band = token_band(grid, half)
    if grid.text:
        edge = grid.video // block * block
        band[edge:], band[:, edge:] = True, True
    blocks = -(-grid.tokens // block)
    over = blocks * block - grid.tokens
    touched = torch.nn.functional.pad(band, (0, over, 0, over))
    touched = touched.view(blocks, block, blocks, block).any(3).any(1)
    assert torch.equal(band_blocks(grid, half, block, cover=True), touched)


@pytest.mark.parametrize("grid", [Grid(3, 32, 48), Grid(2, 31, 45, 17)], ids=str)
@each_block
def test_rounded_band_lies_within_its_cover_where_it_is_wider_than_a_block(grid, block):
    half = half_width(grid, 0.125)
    assert half >= block // 2
    rounded, covering = (band_blocks(grid, half, block, cover=cover) for cover in (False, True))
    assert not (rounded & ~covering).any()
    assert rounded.sum() < covering.sum()


@pytest.mark.parametrize("mask", ["block", "tile"])
@pytest.mark.parametrize("grid", [Grid(3, 32, 48), Grid(1, 64, 64), Grid(2, 45, 80)], ids=str)
@each_block
def test_rounded_masks_keep_about_the_share_that_was_asked_for(grid, mask, block):
    for share in (0.125, 0.25, 0.5):
        density = band_plan(grid, mask, share, block, CPU).mask.density()
        assert 0.6 * share < density < 1.5 * share


@each_grid
@each_block
def test_block_mask_is_the_same_in_all_frame_pairs_where_blocks_fill_frames(grid, block):
    grid = Grid(grid.frames, 16, 16)
    keep = band_blocks(grid, half_width(grid, 0.25), block)
    per = 256 // block
    tiles = keep.view(grid.frames, per, grid.frames, per)
    assert (tiles == tiles[:1, :, :1]).all()


@each_grid
@each_block
def test_every_query_block_keeps_its_own_place_in_every_frame(grid, block):
    keep = band_blocks(grid, 0, block)
    starts = range(0, grid.video, block)
    for i, start in enumerate(starts):
        center = (start + min(start + block, grid.video) - 1) // 2
        if start // grid.frame_tokens != (start + block - 1) // grid.frame_tokens:
            continue
        for frame in range(grid.frames):
            token = frame * grid.frame_tokens + center % grid.frame_tokens
            assert keep[i, token // block]


def test_tiles_are_a_disc_around_the_own_tile_in_every_frame():
    grid = Grid(2, 40, 40, 10)
    # 25 tiles a frame: 25 of 625 pairs alone, 105 with the sides' neighbours, 169 with corners'.
    keep = band_tiles(grid, 0.1, REGIONS[64])
    assert torch.equal(keep[:50, :50], torch.eye(25, dtype=torch.bool).repeat(2, 2))
    for share, corners in ((0.11, False), (0.21, False), (0.23, True)):
        square = torch.zeros(5, 5, dtype=torch.bool)
        square[1:4, 1:4] = corners
        square[2, 1:4], square[1:4, 2] = True, True
        keep = band_tiles(grid, share, REGIONS[64])
        assert torch.equal(keep[12, 25:50].view(5, 5), square)
    assert keep[50:].all() and keep[:, 50:].all()
    assert band_tiles(grid, 1, REGIONS[64]).all()


def test_larger_share_keeps_more():
    grid = Grid(2, 20, 33, 9)
    for mask in MASKS:
        masks = [band_plan(grid, mask, s, 64, CPU).mask.keep() for s in (0.02, 0.1, 0.3, 0.6, 1)]
        for fewer, more in zip(masks, masks[1:], strict=False):
            assert not (fewer & ~more).any()
        assert masks[-1].all() and not masks[0].all()


@each_grid
@pytest.mark.parametrize("budget", [1, 20000, 64 * 2**20])
def test_band_attention_is_exact_in_chunks_of_any_size(grid, budget, device, monkeypatch):
    monkeypatch.setattr(bands, "SCORE_BYTES", budget)
    if budget == 1:
        grid = Grid(grid.frames, 2, 5, grid.text % 5)
    half = half_width(grid, 0.3)
    q, k, v = torch.randn(3, 2, 2, grid.tokens, 16, device=device)
    band = token_band(grid, half).to(device)
    out, lse = band_attention(q, k, v, grid, half)
    torch.testing.assert_close(out, exact(q, k, v, band), atol=1e-5, rtol=1e-5)
    scores = q.double() @ k.double().transpose(-1, -2) / 4
    expected = scores.masked_fill(~band, -torch.inf).logsumexp(-1).float()
    torch.testing.assert_close(lse, expected, atol=1e-5, rtol=1e-5)
    assert lse.dtype == torch.float32


def test_chunks_keep_to_the_budget():
    grid, half = Grid(13, 30, 45, 226), 21
    for budget in (10**5, 10**6, 10**7):
        for first, last in bands._chunks(grid, half, budget):
            keys = grid.frames * (last - first + 2 * half) + grid.text
            assert (last - first) * grid.frames * keys <= budget or last - first == 1


def test_plan_is_built_once_and_outlives_inference_mode(device):
    grid = Grid(2, 11, 13, 3)
    with torch.inference_mode():
        plans = [band_plan(grid, mask, 0.2, 64, device) for mask in MASKS]
    for mask, plan in zip(MASKS, plans, strict=True):
        assert band_plan(grid, mask, 0.2, 64, device) is plan
        assert not plan.mask.idx.is_inference()
        assert plan.mask.idx.device.type == device.type
        assert (plan.order is None) == (mask != "tile")
