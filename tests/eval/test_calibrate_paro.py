"""The search for PAROAttention: orders of planted heads, kept shares, bins, the way to a file."""

from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F

from vdit_sparse.calibration import Calibration, save
from vdit_sparse.call import Call, Origin
from vdit_sparse.eval.calibrators.paro import PAROSearch, memory
from vdit_sparse.eval.calibrators.paro_tiles import (
    choose_orders,
    coverage,
    empty_share,
    incoherence,
    keep_heaviest,
    sample_rows,
    threshold,
    tile_statistics,
)
from vdit_sparse.grid import Grid
from vdit_sparse.kernels.block_mass import block_mass
from vdit_sparse.methods.paro import PAROAttention, unpack
from vdit_sparse.orders import AXES, axis_order

GRID, BLOCK, STEPS = Grid(8, 8, 8), 64, 6
# How fast attention falls along frames, rows and columns; 0 not at all.
ALONG_F, ALONG_H, ALONG_W, IN_FRAME = (0, 2, 2), (2, 0, 2), (2, 2, 0), (2, 0, 0)
SOFT_F, SPREAD = (0, 0.2, 0.2), (0.05, 0.05, 0.05)


def planted(grid, heads, device, noise=0.0):
    """q, k, v `[1, heads, S, 16]`: attention falls with the squared distances of the tokens' places
    times the head's three weights; scores have noise of that standard deviation."""
    axes = [torch.arange(n, dtype=torch.float32) for n in (grid.frames, grid.height, grid.width)]
    places = torch.cartesian_prod(*axes)
    places = places - places.mean(0)
    square = (places**2)[:, None] * torch.tensor(heads)
    # -w (x - y)^2 = 2 w x y - w y^2 up to what is the same for all keys.
    q, k = torch.zeros(2, 1, len(heads), grid.tokens, 16)
    q[0, :, : grid.video, :3] = (2 * places[:, None] * torch.tensor(heads)).transpose(0, 1)
    k[0, :, : grid.video, :3] = places
    q[0, :, : grid.video, 3] = -1
    k[0, :, : grid.video, 3] = square.sum(-1).T
    q[..., 4:] = noise * 12**-0.5 * torch.randn_like(q[..., 4:])
    k[..., 4:] = torch.randn_like(k[..., 4:])
    q = q * 4
    return [x.to(device) for x in (q, k, torch.randn_like(q))]


def call_at(grid, step=0, layer=0, layers=1, steps=STEPS, expert="transformer"):
    return Call(grid, layer, layers, step, steps, {}, Origin(expert=expert))


def recorded(search, calls):
    """The recorder after both passes over calls of (q, k, v) and place."""
    recorder = search.recorder()
    for number in range(recorder.passes):
        recorder.begin(number)
        for qkv, call in calls:
            recorder(*qkv, call)
    return recorder


def searched(search, qkv, grid=GRID, steps=STEPS):
    calls = [(qkv, call_at(grid, step, steps=steps)) for step in range(steps)]
    return recorded(search, calls).result()


def probabilities(q, k, axes, grid):
    """Softmax in fp64 as tiles `[B, H, tiles, BLOCK, tiles, BLOCK]`, the video in that order."""
    order, edge = axis_order(grid, axes, q.device), grid.video // BLOCK * BLOCK
    scores = q[:, :, order].double() @ k[:, :, order].double().mT * q.shape[-1] ** -0.5
    p = torch.softmax(scores, -1)[..., :edge, :edge]
    return p.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))


def as_calibration(search, found, grid, path):
    about = {"layers": 1, "steps": STEPS, "prompts": ("a",), "seeds": (0,), "versions": {}}
    made = Calibration(
        path=str(path / "paro.safetensors"),
        method=search.method.__name__,
        fields=asdict(search),
        origin=Origin(),
        grid=grid,
        tensors=found,
        **about,
    )
    save(made)
    return made.path


def names(found):
    return [AXES[index] for index in found["transformer.order"][0].tolist()]


@pytest.mark.parametrize("grid", [GRID, Grid(8, 9, 10, 17), Grid(5, 9, 14)], ids=str)
def test_planted_heads_get_the_order_that_packs_them(grid, device):
    heads = (ALONG_F, ALONG_H, ALONG_W, IN_FRAME)
    found = searched(PAROSearch(bins=1), planted(grid, heads, device, noise=1.0), grid, 1)
    # A plane of two axes that fits into a block packs lines along either.
    if min(grid.height * grid.width, grid.frames * grid.height, grid.frames * grid.width) > BLOCK:
        assert [name[-1] for name in names(found)[:3]] == ["F", "H", "W"]
        assert names(found)[3] in ("FHW", "FWH")
    covered = found["transformer.coverage"][0]
    chosen = covered.gather(1, found["transformer.order"][0].long()[:, None])[:, 0]
    assert (chosen >= 0.8 * covered.amax(1)).all()
    assert (covered.amin(1) < 0.8 * covered.amax(1)).all()


@pytest.mark.parametrize("alpha", [0.5, 0.0])
def test_incoherence_speaks_for_dense_blocks_too(alpha, device):
    qkv = planted(GRID, (ALONG_F, ALONG_H, ALONG_W), device)
    found = searched(PAROSearch(alpha=alpha, bins=1), qkv, steps=1)
    covered = found["transformer.coverage"][0]
    chosen = covered.gather(1, found["transformer.order"][0].long()[:, None])[:, 0]
    torch.testing.assert_close(chosen, covered.amax(1))


def test_papers_sigma_takes_scattered_diagonals_for_empty_tiles(device):
    qkv = planted(GRID, (ALONG_F,), device, noise=1.0)
    found = searched(PAROSearch(sigma=0.9, bins=1), qkv, steps=1)
    assert names(found)[0] in ("FHW", "FWH")


@pytest.mark.parametrize("mode", ["threshold", "per_head"])
@pytest.mark.parametrize("density", [0.2, 0.3, 0.7, 1.0])
def test_density_is_met(density, mode, device):
    grid = Grid(6, 11, 12, 17)
    search = PAROSearch(density=density, mode=mode)
    found = searched(search, planted(grid, (SOFT_F, SPREAD), device, noise=0.5), grid, 3)
    kept = found["transformer.density"]
    assert kept.shape == (2, 1, 2)
    assert float(kept.mean()) == pytest.approx(density, abs=0.01)
    if mode == "per_head":
        assert (kept - density).abs().max() < 0.01
    elif density < 0.5:
        assert kept[0, 0].max() - kept[0, 0].min() > 0.05
    blocks, edge = -(-grid.tokens // BLOCK), grid.video // BLOCK
    keep = unpack(found["transformer.keep"], blocks)
    assert keep[..., edge:, :].all() and keep[..., edge:].all()
    assert keep[..., :edge].any(-1).all()
    torch.testing.assert_close(keep[..., :edge, :edge].float().mean((-2, -1)), kept)


def test_second_half_of_the_run_shares_its_masks():
    search = PAROSearch()
    assert [search.bin_of(step, 7) for step in range(7)] == [0, 1, 2, 3, 3, 3, 3]
    assert [search.bin_of(step, 1) for step in range(1)] == [0]
    for bins in (1, 3, 4, 10):
        numbers = [PAROSearch(bins=bins).bin_of(step, 10) for step in range(10)]
        assert numbers[0] == 0 and numbers[-1] == bins - 1
        assert numbers == sorted(numbers)


def test_bins_hold_the_masks_of_their_own_steps(device):
    kinds = [ALONG_F, IN_FRAME, SPREAD, ALONG_H, ALONG_H, ALONG_H]
    calls = [
        (planted(GRID, (kind,), device, noise=1.0), call_at(GRID, step))
        for step, kind in enumerate(kinds)
    ]
    found = recorded(PAROSearch(density=0.3), calls).result()
    assert found["transformer.bin"].tolist() == [0, 1, 2, 3, 3, 3]
    keep = unpack(found["transformer.keep"], 8)[:, 0, 0]
    assert all(not torch.equal(keep[i], keep[j]) for i in range(4) for j in range(i))


def test_shared_masks_come_from_the_mean_map(device):
    calls = [planted(GRID, (ALONG_F, SPREAD), device, noise=1.0) for _ in range(3)]
    search = PAROSearch(bins=1, density=0.4)
    batch, call = [torch.cat(x) for x in zip(*calls, strict=True)], call_at(GRID, 0, steps=1)
    one = recorded(search, [(batch, call)]).result()
    other = recorded(search, [(qkv, call) for qkv in calls]).result()
    for name in ("density", "coverage", "kept_mass"):
        torch.testing.assert_close(
            one[f"transformer.{name}"], other[f"transformer.{name}"], atol=2e-2, rtol=2e-2
        )
    differing = unpack(one["transformer.keep"], 8) != unpack(other["transformer.keep"], 8)
    assert differing.float().mean() < 0.02


@pytest.mark.parametrize("grid", [GRID, Grid(5, 9, 10, 17)], ids=str)
def test_row_errors_are_bounded_by_the_dropped_mass(grid, device, tmp_path):
    q, k, v = planted(grid, (ALONG_F, ALONG_H, SPREAD), device, noise=0.1)
    search = PAROSearch(density=0.4)
    found = searched(search, (q, k, v), grid)
    method = PAROAttention(calibration=as_calibration(search, found, grid, tmp_path))
    p = torch.softmax(q.double() @ k.double().mT / 4, -1)
    plan = method.plan(q, k, call_at(grid))
    seen = torch.zeros_like(p, dtype=torch.bool)
    kept = plan.mask.token_mask(grid.tokens, grid.tokens)[0]
    order = plan.order if plan.order is not None else torch.arange(grid.tokens).expand(3, -1)
    for head in range(3):
        seen[0, head][order[head][:, None], order[head]] = kept[head]
    dropped = torch.where(seen, 0, p).sum(-1)
    error = (method(q, k, v, call_at(grid)) - p @ v.double()).norm(dim=-1)
    assert dropped.max() > 0.01
    assert (error <= 2 * dropped * v.double().norm(dim=-1).amax() + 1e-4).all()
    edge = grid.video // BLOCK * BLOCK
    tiles = torch.stack([dropped[0, h][order[h][:edge]] for h in range(3)]).mean(1)
    if grid.text == 0 and grid.video % BLOCK == 0:
        mass = found["transformer.kept_mass"][0, 0].to(device)
        torch.testing.assert_close(1 - tiles.float(), mass, atol=2e-3, rtol=2e-3)


def test_recorder_answers_dense_attention(device):
    q, k, v = planted(Grid(3, 6, 7, 5), (ALONG_F, SPREAD), device, noise=0.5)
    call = call_at(Grid(3, 6, 7, 5))
    out = PAROSearch().recorder()(q, k, v, call)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double()).float()
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert call.note.density == 1 and call.note.searched


@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("grid", [Grid(7, 8, 10), Grid(5, 9, 10, 17)], ids=str)
def test_with_all_steps_and_rows_orders_are_those_of_whole_maps(grid, alpha, device):
    heads = (ALONG_F, ALONG_H, ALONG_W, SOFT_F)
    calls = [
        (planted(grid, heads, device, noise=1.0), call_at(grid, step, steps=3)) for step in range(3)
    ]
    search = PAROSearch(bins=1, alpha=alpha, order_steps=3, order_rows=1000, epsilon=1e-3)
    found = recorded(search, calls).result()
    metrics = torch.zeros(3, 6, 4, dtype=torch.float64)
    for (q, k, _), _ in calls:
        for i, axes in enumerate(AXES):
            p = probabilities(q, k, axes, grid)[0].cpu()
            empty = (p < 1e-3).double().mean((2, 4)) >= 0.999
            spread = p.amax((2, 4)) / p.mean((2, 4))
            covered = torch.stack([coverage(x) for x in p.sum((2, 4))])
            metrics[:, i] += torch.stack(
                [empty.double().mean((1, 2)), spread.mean((1, 2)), covered]
            )
    choice = choose_orders(*(metrics[:2] / 3)[:, None], alpha)[0]
    assert found["transformer.order"][0].tolist() == choice.tolist()
    torch.testing.assert_close(found["transformer.coverage"][0], (metrics[2] / 3).T.float())


def test_masks_come_from_the_map_under_the_chosen_orders(device):
    grid = Grid(5, 9, 10, 17)
    qkv = planted(grid, (ALONG_F, ALONG_H), device, noise=1.0)
    recorder = recorded(PAROSearch(bins=1), [(qkv, call_at(grid, steps=1))])
    for head, axes in enumerate(names(recorder.result())):
        p = probabilities(*(x[:, head : head + 1] for x in qkv[:2]), axes, grid)[0, 0].cpu()
        expected = p.sum((1, 3)) * (p.shape[0] / BLOCK)
        held = recorder.record.found["transformer"][0].maps[0][head]
        torch.testing.assert_close(held.double(), expected, atol=1e-3, rtol=2e-3)


@pytest.mark.parametrize("order_rows", [4, 8])
def test_sampled_rows_find_the_planted_orders_too(order_rows, device):
    grid = Grid(8, 16, 16)
    heads = (ALONG_F, ALONG_H, ALONG_W)
    search = PAROSearch(bins=1, order_rows=order_rows)
    found = searched(search, planted(grid, heads, device, noise=1.0), grid, 2)
    assert [name[-1] for name in names(found)] == ["F", "H", "W"]


def test_every_row_is_sampled_equally_often():
    draws = 3000
    generator = torch.Generator().manual_seed(1)
    for tiles, count in ((10, 4), (7, 6), (5, 1)):
        rows = torch.stack([sample_rows(tiles, count, generator) for _ in range(draws)])
        assert rows.shape == (draws, count) and (rows.diff(dim=1) >= 0).all()
        often = torch.bincount(rows.flatten(), minlength=tiles) / (draws * count)
        # Six standard deviations.
        assert (often - 1 / tiles).abs().max() < 6 * (1 / tiles / (draws * count)) ** 0.5
    for count in (7, 100):
        assert torch.equal(sample_rows(7, count, generator), torch.arange(7))


def test_orders_are_measured_at_few_steps_from_the_first_to_the_last(device):
    assert PAROSearch().measured_steps(40) == {0, 13, 26, 39}
    assert PAROSearch(order_steps=1).measured_steps(9) == {4}
    for steps in (1, 2, 5, 8):
        for count in (steps, steps + 1, 50):
            measured = PAROSearch(order_steps=count).measured_steps(steps)
            assert measured == set(range(steps)) or count == 1
    recorder, qkv = PAROSearch(order_steps=2).recorder(), planted(GRID, (ALONG_F,), device)
    calls = [call_at(GRID, step) for step in range(STEPS)]
    for call in calls:
        recorder(*qkv, call)
    assert [call.note.searched for call in calls] == [True] + [False] * 4 + [True]
    sums = recorder.record.found["transformer"][0]
    assert sums.measured == 2 and not sums.maps and sums.metrics.shape == (3, 6, 1)


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("bins", ["half", 2])
def test_memory_is_that_of_the_maps(block, bins, device):
    grid, search = Grid(5, 9, 10, 17), PAROSearch(block=block, bins=bins)
    qkv = planted(grid, (ALONG_F, SPREAD, IN_FRAME), device)
    calls = [
        (qkv, call_at(grid, step, layer, layers=2, steps=3))
        for step in range(3)
        for layer in range(2)
    ]
    layers = recorded(search, calls).record.found["transformer"].values()
    held = sum(x.nbytes for sums in layers for x in sums.maps.values())
    assert held == memory(search, grid, layers=2, heads=3, steps=3)
    wan = memory(PAROSearch(bins=4), Grid(21, 45, 80), layers=40, heads=40, steps=50)
    assert wan == 2 * 4 * 1600 * 1181**2


@pytest.mark.parametrize("rows", [1, 128])
def test_tile_statistics_equal_those_of_the_map(rows, device, monkeypatch):
    monkeypatch.setattr("vdit_sparse.eval.calibrators.paro_tiles.CHUNK", rows * 192)
    q, k = torch.randn(2, 192 + 40, 16, device=device, dtype=torch.float64)
    lse = torch.logsumexp(q @ k.T / 4, -1)
    p = (q @ k.T / 4 - lse[:, None]).exp()[:192, :192].view(3, 64, 3, 64)
    inputs = q[:192].float(), k[:192].float(), lse[:192].float()
    mass, small, peak = tile_statistics(*inputs, 64, 1e-3, True)
    torch.testing.assert_close(mass.double(), p.sum((1, 3)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(peak.double(), p.amax((1, 3)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(small.double(), (p < 1e-3).double().mean((1, 3)), atol=1e-3, rtol=0)
    kernel = block_mass(*(x[None, None] for x in inputs), 64)
    torch.testing.assert_close(mass, kernel[0, 0], atol=1e-4, rtol=1e-4)
    assert tile_statistics(*inputs, 64, None, False)[1:] == (None, None)


def test_metrics_lie_in_their_ranges():
    mass, peak = torch.rand(5, 5) + 0.1, torch.ones(5, 5)
    assert incoherence(mass, peak, 64) >= 1
    assert incoherence(torch.full((3, 3), 64 * 64 * 0.2), torch.full((3, 3), 0.2), 64) == 1
    assert incoherence(torch.zeros(3, 3), torch.zeros(3, 3), 64) == 1
    assert empty_share(torch.tensor([[1.0, 0.99], [0.5, 0.0]]), 0.99) == 0.5
    order = torch.randperm(5)
    assert coverage(mass[order][:, order]) == pytest.approx(float(coverage(mass)))
    assert incoherence(mass[order], peak, 64) == pytest.approx(float(incoherence(mass, peak, 64)))


def test_empty_tiles_speak_for_an_order_and_incoherence_against_it():
    empty = torch.tensor([0.1, 0.6, 0.6, 0.2, 0.1, 0.5]).view(1, 6, 1)
    spread = torch.tensor([9.0, 5.0, 5.0, 2.0, 9.0, 7.0]).view(1, 6, 1)
    assert choose_orders(empty, spread, 1.0).item() == 1
    assert choose_orders(empty, spread, 0.0).item() == 3
    assert choose_orders(torch.ones(1, 6, 1), torch.zeros(1, 6, 1), 0.5).item() == 0


def test_threshold_is_monotone_and_exact():
    maps = [torch.rand(3, 9, 9).half() for _ in range(4)]
    shares = [0.1, 0.3, 0.5, 0.9, 1.0]
    levels = [float(threshold(maps, share)) for share in shares]
    assert levels == sorted(levels, reverse=True)
    kept = [torch.stack([*keep_heaviest(maps, share, "threshold", 64)]) for share in shares]
    for fewer, more in zip(kept, kept[1:], strict=False):
        assert not (fewer & ~more).any()
    for share, keep in zip(shares, kept, strict=True):
        assert float(keep.float().mean()) == pytest.approx(max(share, 1 / 9), abs=0.02)


def test_an_image_has_two_orders_and_the_first_of_equal_ones_is_taken(device):
    grid, heads = Grid(1, 32, 32), ((0, 0, 0.5), (0, 0.5, 0))
    found = searched(PAROSearch(bins=1), planted(grid, heads, device, noise=1.0), grid, 1)
    assert names(found) == ["FWH", "FHW"]
    covered = found["transformer.coverage"][0]
    assert torch.equal(covered[:, [0, 0, 1, 1]], covered[:, [2, 3, 4, 5]])


def test_experts_are_searched_apart(device):
    qkv = planted(GRID, (ALONG_F,), device)
    experts = ["transformer"] * 2 + ["transformer_2"] * 4
    calls = [(qkv, call_at(GRID, step, expert=name)) for step, name in enumerate(experts)]
    found = recorded(PAROSearch(bins=3), calls).result()
    assert found["transformer.bin"].tolist() == [0, 0, -1, -1, -1, -1]
    assert found["transformer_2.bin"].tolist() == [-1, -1, 0, 0, 1, 1]
    assert [len(found[f"{name}.keep"]) for name in ("transformer", "transformer_2")] == [1, 2]
    with pytest.raises(ValueError, match="No order can be chosen for transformer, .*order_steps=1"):
        recorded(PAROSearch(order_steps=1), calls)


def test_what_cannot_be_searched_raises(device):
    qkv = planted(GRID, (ALONG_F,), device)
    recorder = PAROSearch().recorder()
    with pytest.raises(ValueError, match="Nothing was recorded"):
        recorder.result()
    with pytest.raises(ValueError, match="needs the number of denoising steps"):
        recorder(*qkv, call_at(GRID, steps=None))
    small = Grid(1, 7, 9, 3)
    with pytest.raises(ValueError, match="63 tokens, less than one block of 64"):
        recorder(*planted(small, (ALONG_F,), device), call_at(small))
    with pytest.raises(ValueError, match="passes of this recorder are 0 and 1, got 2"):
        recorder.begin(2)
    recorder.begin(0)
    recorder(*qkv, call_at(GRID, layers=2))
    with pytest.raises(ValueError, match="one grid and number of steps"):
        recorder(*qkv, call_at(Grid(4, 16, 8), layers=2))
    with pytest.raises(ValueError, match=r"Layers \[1\] of 2 were not recorded"):
        recorder.begin(1)
    with pytest.raises(ValueError, match=r"call begin\(1\) and run the same prompts once more"):
        recorder.result()
    recorder(*qkv, call_at(GRID, layer=1, layers=2))
    recorder.begin(1)
    with pytest.raises(ValueError, match="Layer 0 of transformer_2 was not in the first pass"):
        recorder(*qkv, call_at(GRID, layers=2, expert="transformer_2"))
    recorder.record.found.pop("transformer_2")
    recorder(*qkv, call_at(GRID, layer=1, layers=2))
    with pytest.raises(ValueError, match=r"Layers \[0\] of 2 were not recorded"):
        recorder.result()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"block": 32}, "block must be one of"),
        ({"density": 0}, "density must be a finite number above 0"),
        ({"density": 1.1}, "density must be"),
        ({"alpha": -0.1}, "alpha must be a number from 0 to 1, got -0.1"),
        ({"epsilon": 0}, "epsilon must be"),
        ({"sigma": 2}, "sigma must be"),
        ({"mode": "rows"}, "mode must be one of"),
        ({"bins": 0}, 'bins must be "half" or an integer of at least 1, got 0'),
        ({"bins": "all"}, "bins must be"),
        ({"order_steps": 0}, "order_steps must be an integer of at least 1, got 0"),
        ({"order_rows": 2.0}, "order_rows must be an integer of at least 1, got 2.0"),
    ],
)
def test_fields_out_of_range_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        PAROSearch(**fields)
