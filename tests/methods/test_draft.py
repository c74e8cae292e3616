"""DraftAttention's map against fp64, and which pairs of regions it keeps."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.methods.draft_cases import (
    BARE,
    GRIDS,
    TEXT,
    WHOLE,
    block_of_tokens,
    exact_map,
    inputs,
    planted,
    video_part,
)
from vdit_sparse.grid import Grid
from vdit_sparse.methods.draft import DraftAttention


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("block", [64, 128])
def test_draft_map_is_the_softmax_of_mean_logits(grid, block, device):
    method = DraftAttention(block=block)
    q, k, _ = inputs(grid, device)
    draft = method.draft_map(q, k, grid)
    assert draft.dtype == torch.float32
    torch.testing.assert_close(
        draft.cpu(), exact_map(method, q, k, grid).float(), atol=1e-5, rtol=1e-5
    )


def test_pooled_logit_is_the_mean_of_the_blocks_logits(device):
    q, k, _ = inputs(WHOLE, device)
    home = block_of_tokens(DraftAttention(), WHOLE)
    logits = (q.double() @ k.double().mT / 4).cpu()
    means = F.one_hot(home).double() / 128
    expected = (means.mT @ logits @ means).log_softmax(-1)
    draft = DraftAttention().draft_map(q, k, WHOLE).cpu()
    torch.testing.assert_close(draft, expected.float(), atol=1e-5, rtol=1e-5)


def test_half_precision_is_pooled_in_fp32(device):
    q, k, _ = inputs(Grid(2, 9, 19), device).bfloat16()
    draft = DraftAttention().draft_map(q, k, Grid(2, 9, 19))
    expected = DraftAttention().draft_map(q.float(), k.float(), Grid(2, 9, 19))
    torch.testing.assert_close(draft, expected, atol=1e-5, rtol=1e-5)


def test_where_regions_are_constant_the_pairs_of_most_mass_are_kept(device):
    q, k = planted(WHOLE, device)
    mass = (q.double() @ k.double().mT / 4).softmax(-1).cpu()
    home = F.one_hot(block_of_tokens(DraftAttention(), WHOLE)).double()
    block_mass = home.mT @ mass @ home / 128
    draft = DraftAttention().draft_map(q, k, WHOLE).cpu()
    torch.testing.assert_close(draft.exp(), block_mass.float(), atol=1e-5, rtol=1e-5)
    method = DraftAttention(density=0.4, sink_frames=1, **BARE)
    kept = video_part(method, q, k, WHOLE)
    best = block_mass.flatten(2).argsort(-1, descending=True)[..., : math.ceil(0.4 * 256)]
    expected = torch.zeros(2, 2, 256, dtype=torch.bool).scatter(-1, best, True).view(kept.shape)
    expected[..., :4] = True
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("select", ["exact", "released"])
@pytest.mark.parametrize("density", [1e-6, 0.07, 0.25, 0.5, 1.0])
def test_as_many_pairs_are_kept_as_density_says(select, density, device):
    q, k, _ = inputs(TEXT, device)
    kept = video_part(DraftAttention(density=density, select=select, **BARE), q, k, TEXT)
    expected = {
        "exact": {1e-6: 1, 0.07: 11, 0.25: 36, 0.5: 72, 1.0: 144},
        "released": {1e-6: 2, 0.07: 12, 0.25: 37, 0.5: 73, 1.0: 144},
    }[select][density]
    assert kept.sum((2, 3)).tolist() == [[expected] * 2] * 2


def test_density_times_pairs_is_not_rounded_up_by_its_floating_point_error(device):
    grid = Grid(10, 8, 16)
    q, k, _ = inputs(grid, device)
    assert 0.07 * 100 > 7
    kept = video_part(DraftAttention(density=0.07, sink_frames=1, **BARE), q, k, grid)
    best = exact_map(DraftAttention(), q, k, grid).flatten(2).argsort(-1, descending=True)[..., :7]
    assert (kept[..., 1:].sum((2, 3)) == (best % 10 > 0).sum(-1)).all()


def test_equal_pairs_go_by_index_or_are_all_kept(device):
    q = torch.zeros(1, 1, TEXT.tokens, 16, device=device)
    exact = video_part(DraftAttention(density=0.1, **BARE), q, q, TEXT)
    assert exact.flatten().nonzero()[:, 0].tolist() == list(range(15))
    assert video_part(DraftAttention(density=0.1, select="released", **BARE), q, q, TEXT).all()


@pytest.mark.parametrize("select", ["exact", "released"])
def test_higher_density_keeps_more(select, device):
    q, k, _ = inputs(WHOLE, device)
    masks = [
        video_part(DraftAttention(density=density, select=select), q, k, WHOLE)
        for density in (0.01, 0.1, 0.3, 0.8, 1.0)
    ]
    for fewer, more in zip(masks, masks[1:], strict=False):
        assert not (fewer & ~more).any()
        assert fewer.sum() < more.sum()


def test_rows_share_one_budget(device):
    # Every region looks at region 0, the later the more sharply: those pairs are the best.
    home = block_of_tokens(DraftAttention(), TEXT)
    k = torch.zeros(1, 1, TEXT.tokens, 16, device=device)
    k[:, :, home.to(device) == 0] = 1
    q = home.clamp(min=0).div(8)[None, None, :, None].repeat(1, 1, 1, 16).to(device)
    kept = video_part(DraftAttention(density=4 / 144, **BARE), q, k, TEXT)[0, 0]
    assert kept.nonzero().tolist() == [[8, 0], [9, 0], [10, 0], [11, 0]]


@pytest.mark.parametrize("select", ["exact", "released"])
@pytest.mark.parametrize("grid", [Grid(1, 9, 13), Grid(5, 9, 19), WHOLE], ids=str)
def test_a_row_without_any_key_keeps_its_best_region(grid, select, device):
    q, k, _ = inputs(grid, device)
    method = DraftAttention(density=0.05, select=select, **BARE)
    kept = video_part(method, q, k, grid)
    draft = exact_map(method, q, k, grid)
    assert kept.any(-1).all()
    assert kept.gather(-1, draft.argmax(-1, keepdim=True)).all()
    g = kept.shape[-1]
    count = max(1, math.ceil(0.05 * g * g)) if select == "exact" else g * g - int(0.95 * g * g) + 1
    chosen = draft >= draft.flatten(2).sort(-1).values[..., -min(count, g * g)][..., None, None]
    empty = ~chosen.any(-1)
    assert torch.equal(kept[~empty], chosen[~empty])
    assert (kept[empty].sum(-1) == 1).all()


@pytest.mark.parametrize("grid", [WHOLE, Grid(4, 9, 19, 17), Grid(2, 9, 19)], ids=str)
@pytest.mark.parametrize("select", ["exact", "released"])
def test_forced_pairs_are_added_to_the_ranked_ones(grid, select, device):
    q, k, _ = inputs(grid, device)
    ranked = DraftAttention(density=0.1, select=select)
    before = video_part(ranked, q, k, grid)
    home = block_of_tokens(ranked, grid)[: grid.video]
    frame = torch.arange(grid.video) // grid.frame_tokens
    holds = torch.zeros(before.shape[-1], grid.frames, dtype=torch.bool)
    holds[home[home >= 0], frame[home >= 0]] = True
    assert before.diagonal(dim1=-2, dim2=-1).all()
    sink = video_part(replace(ranked, sink_frames=2), q, k, grid)
    assert torch.equal(sink, before | holds[:, :2].any(1))
    intra = video_part(replace(ranked, intra_frame=True), q, k, grid)
    assert torch.equal(intra, before | (holds[:, None] & holds).any(-1))
    assert video_part(replace(ranked, sink_frames=99), q, k, grid).all()
