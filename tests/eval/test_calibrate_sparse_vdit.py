"""The search of Sparse-vDiT: planted heads, its rule, its trajectory, and its file in a run."""

import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F

import vdit_sparse
from tests.methods.sparse_vdit_cases import (
    GRID,
    GRIDS,
    ORIGIN,
    call_at,
    planted_heads,
    written,
)
from tests.tiny_models import WAN_CALL, tiny_wan
from vdit_sparse.calibration import load, save
from vdit_sparse.eval.calibrators.sparse_vdit import SparseVDiTSearch
from vdit_sparse.grid import Grid
from vdit_sparse.methods.sparse_vdit import (
    Patterns,
    SparseVDiTAttention,
    mode_masks,
    stripe_count,
)

BLOCKS = SparseVDiTSearch(block=64, penalty=0.3, epsilon=0.6, cost="blocks")
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def searched(search, q, k, v, **place):
    """Output and result of a search of one call."""
    recorder = search.recorder()
    return recorder(q, k, v, call_at(steps=1, **place)), recorder.result()


def modes_of(search, q, k, v):
    return searched(search, q, k, v)[1]["transformer.modes"][0, 0].tolist()


@pytest.mark.parametrize("loss", ["relative", "absolute"])
def test_planted_heads_get_their_modes(loss, device):
    q, k, v = planted_heads(device)
    search = replace(BLOCKS, loss=loss)
    assert modes_of(search, q, k, v) == [2, 3, 4, 0, 1]
    # Nothing depends on where a head stands.
    order = [3, 1, 4, 2, 0]
    assert modes_of(search, *(x[:, order] for x in (q, k, v))) == [0, 3, 1, 4, 2]


def test_planted_stripe_head_finds_its_block(device):
    _, found = searched(BLOCKS, *planted_heads(device))
    stripes = found["transformer.stripes"]
    assert stripes.shape == (1, 5, 4)
    assert stripes.dtype == torch.int32
    assert 5 in stripes[0, 2]
    assert (stripes.diff(dim=-1) > 0).all()


def test_static_stripes_are_not_stored(device):
    search = replace(BLOCKS, stripes="static")
    _, found = searched(search, *planted_heads(device))
    assert "transformer.stripes" not in found
    assert found["transformer.modes"][0, 0].tolist()[:2] == [2, 3]


def test_without_penalty_and_threshold_the_least_error_wins(device):
    search, heads = replace(BLOCKS, penalty=0, epsilon=math.inf), planted_heads(device)
    _, found = searched(search, *heads)
    losses = found["transformer.losses"][0, 0]
    assert torch.equal(found["transformer.modes"][0, 0].long(), losses.argmin(-1) + 1)
    # Skipping costs nothing, so that its loss has no penalty.
    _, paid = searched(BLOCKS, *heads)
    masks = mode_masks(GRID, BLOCKS).double().mean((1, 2))
    added = paid["transformer.losses"][0, 0] - losses
    torch.testing.assert_close(
        added[:, :3], (0.3 * masks[1:4]).float().expand(5, 3), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(added[:, 3], torch.full((5,), 0.3 * 4 / 16), atol=1e-6, rtol=0)


@pytest.mark.parametrize("loss", ["relative", "absolute"])
def test_losses_are_errors_of_masked_attention(loss, device):
    q, k, v = torch.randn(3, 2, 2, GRID.tokens, 16, device=device)
    v[:, 1] *= 3
    _, found = searched(replace(BLOCKS, loss=loss, penalty=0), q, k, v)
    exact = [x.double() for x in (q, k, v)]
    dense = F.scaled_dot_product_attention(*exact)
    band = mode_masks(GRID, BLOCKS)[2].repeat_interleave(64, 0).repeat_interleave(64, 1)
    band = F.scaled_dot_product_attention(*exact, attn_mask=band.to(device))
    energy, error = (x.square().sum((2, 3)) for x in (dense, band - dense))
    layer = energy.mean(1, keepdim=True)
    expected = torch.stack([energy / layer, error / (energy if loss == "relative" else layer)], -1)
    losses = found["transformer.losses"][0, 0, :, :2]
    torch.testing.assert_close(losses, expected.mean(0).float().cpu(), atol=1e-5, rtol=1e-4)


def test_padding_changes_neither_losses_nor_stripes(device):
    q, k, v = torch.randn(3, 2, 2, 8 * 128 + 40, 16, device=device)
    search, found = replace(BLOCKS, penalty=0), []
    for text, padding in ((24, None), (40, 100.0), (40, 0.0)):
        grid = Grid(8, 8, 16, text)
        qkv = [x[:, :, : grid.tokens].clone() for x in (q, k, v)]
        kv_len = None
        if padding is not None:
            for x in qkv:
                x[:, :, -16:] = padding
            kv_len = torch.full((2,), grid.tokens - 16, dtype=torch.int32, device=device)
        recorder = search.recorder()
        recorder(*qkv, replace(call_at(grid, steps=1), kv_len=kv_len))
        found.append(recorder.result())
    assert torch.equal(found[1]["transformer.stripes"], found[2]["transformer.stripes"])
    torch.testing.assert_close(found[1]["transformer.losses"], found[2]["transformer.losses"])
    # Mode 1 is zero: its loss is the energy of the real rows, the same with and without padding.
    skipped = [x["transformer.losses"][..., 0] for x in found]
    torch.testing.assert_close(skipped[0], skipped[1], atol=1e-5, rtol=1e-5)


def test_stripes_are_as_many_as_the_longest_text_leaves(device):
    recorder = BLOCKS.recorder()
    for text in (70, 5, 20):
        grid = Grid(8, 8, 16, text)
        q, k, v = torch.randn(3, 1, 2, grid.tokens, 16, device=device)
        recorder(q, k, v, call_at(grid, steps=1))
    stripes = recorder.result()["transformer.stripes"]
    count = stripe_count(Grid(8, 8, 16, 70), BLOCKS)
    assert stripes.shape == (1, 2, count) and count < stripe_count(Grid(8, 8, 16), BLOCKS)
    assert stripes.max() < 16


def test_full_heads_do_not_increase_with_epsilon(device):
    q, k, v = planted_heads(device)
    full = [
        modes_of(replace(BLOCKS, epsilon=epsilon), q, k, v).count(0)
        for epsilon in (0, 0.05, 0.1, 0.3, 0.6, 3.0, math.inf)
    ]
    assert full == sorted(full, reverse=True)
    assert full[0] == 5
    assert full[-1] == 0


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("stripes", ["searched", "static"])
def test_all_full_equals_dense_on_any_grid(grid, stripes, device):
    q, k, v = torch.randn(3, 2, 2, grid.tokens, 16, device=device)
    search = replace(BLOCKS, epsilon=0, stripes=stripes)
    out, found = searched(search, q, k, v, grid=grid)
    assert (found["transformer.modes"] == 0).all()
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double()).float()
    torch.testing.assert_close(out, expected, **TOLERANCE)


@pytest.mark.parametrize(
    "losses, costs, mode",
    [
        ([0.2, 0.2, 0.2, 0.2], [1, 0.0, 0.3, 0.3, 0.2], 1),
        ([0.9, 0.2, 0.2, 0.2], [1, 0.0, 0.3, 0.3, 0.2], 4),
        ([0.9, 0.2, 0.2, 0.3], [1, 0.0, 0.3, 0.3, 0.2], 2),
        ([0.9, 0.2, 0.2, 0.3], [1, 0.0, 0.4, 0.3, 0.2], 3),
        ([0.9, 0.5, 0.3, 0.4], [1, 0.0, 0.3, 0.3, 0.2], 3),
        ([0.9, 0.7, 0.8, 0.61], [1, 0.0, 0.3, 0.3, 0.2], 0),
        ([0.9, 0.7, 0.6, 0.61], [1, 0.0, 0.3, 0.3, 0.2], 3),
        ([math.nan] * 4, [1, 0.0, 0.3, 0.3, 0.2], 0),
    ],
)
def test_decision(losses, costs, mode):
    assert BLOCKS.decide(torch.tensor(losses), torch.tensor(costs)) == mode


def test_calls_go_on_with_what_they_chose_and_a_run_repeats_it(tmp_path, device):
    q, k, v = planted_heads(device)
    out, found = searched(BLOCKS, q, k, v)
    assert (out[:, 4] == 0).all()
    path = tmp_path / "found.safetensors"
    save(written(path, found, BLOCKS, GRID, 1, 1))
    back = load(path)
    assert SparseVDiTSearch(**back.fields) == BLOCKS
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in found.items())
    call = call_at(steps=1)
    method = SparseVDiTAttention(calibration=str(path))
    torch.testing.assert_close(method(q, k, v, call), out, atol=1e-6, rtol=0)
    expected = (1 + sum(mode_masks(GRID, BLOCKS).double().mean((1, 2))[2:4]) + 4 / 16) / 5
    assert float(call.note.density) == pytest.approx(float(expected))


def test_samples_branches_and_steps_are_averaged_where_they_should(device):
    recorder = BLOCKS.recorder()
    first, second = (torch.randn(3, 1, 2, GRID.tokens, 16, device=device) for _ in range(2))
    alone = [searched(BLOCKS, *x)[1]["transformer.losses"][0, 0] for x in (first, second)]
    for inputs in (first, second):
        call = call_at(steps=2, step=0)
        recorder(*inputs, call)
        assert call.note.searched
        assert call.note.density == 1
    recorder(*second, call_at(steps=2, step=1))
    found = recorder.result()
    losses = found["transformer.losses"]
    assert losses.shape == (2, 1, 2, 4)
    assert losses.dtype == torch.float32
    # The stripes of the second call are those of both calls' mass.
    mean = (alone[0] + alone[1]) / 2
    torch.testing.assert_close(losses[0, 0, :, :3], mean[:, :3], atol=1e-6, rtol=0)
    torch.testing.assert_close(losses[1, 0, :, :3], alone[1][:, :3], atol=1e-6, rtol=0)


def test_what_was_recorded_outlives_inference_mode(device):
    recorder = BLOCKS.recorder()
    q, k, v = torch.randn(3, 1, 2, GRID.tokens, 16, device=device)
    with torch.inference_mode():
        recorder(q, k, v, call_at(steps=1))
    recorder(q, k, v, call_at(steps=1))
    for tensor in recorder.result().values():
        assert not tensor.is_inference()


def test_experts_stand_apart_and_what_did_not_run_is_marked(device):
    recorder = BLOCKS.recorder()
    q, k, v = torch.randn(3, 1, 2, GRID.tokens, 16, device=device)
    for step, expert in enumerate(["transformer", "transformer_2", "transformer_2"]):
        recorder(q, k, v, call_at(step=step, steps=3, expert=expert))
    found = recorder.result()
    for expert, ran in (("transformer", [1, 0, 0]), ("transformer_2", [0, 1, 1])):
        known = (found[f"{expert}.modes"] >= 0).all(-1).all(-1)
        assert known.tolist() == [bool(x) for x in ran]
        assert torch.equal(
            found[f"{expert}.losses"].isnan(), ~known[:, None, None, None].expand(3, 1, 2, 4)
        )


def test_time_is_measured_once_for_each_shape(device):
    search = replace(BLOCKS, cost="time")
    recorder = search.recorder()
    q, k, v = planted_heads(device)
    for step in range(2):
        recorder(q, k, v, call_at(step=step, steps=2))
    assert len(recorder.record.costs) == 1
    found = recorder.result()
    milliseconds = found["transformer.milliseconds"]
    assert milliseconds.shape == (5,)
    assert (milliseconds > 0).all()
    _, free = searched(replace(BLOCKS, penalty=0), q, k, v)
    added = (found["transformer.losses"] - free["transformer.losses"])[0, 0, :, :3]
    expected = 0.3 * milliseconds[1:4] / milliseconds[0]
    torch.testing.assert_close(added, expected.expand(5, 3), atol=1e-5, rtol=1e-4)


def test_what_does_not_fit_raises(device):
    recorder = BLOCKS.recorder()
    with pytest.raises(RuntimeError, match="Nothing was recorded"):
        recorder.result()
    q, k, v = torch.randn(3, 1, 2, GRID.tokens, 16, device=device)
    with pytest.raises(ValueError, match="needs the number of denoising steps"):
        recorder(q, k, v, call_at(steps=None))
    recorder(q, k, v, call_at(steps=2))
    with pytest.raises(ValueError, match="need one grid"):
        recorder(q, k, v, call_at(steps=3))
    with pytest.raises(ValueError, match="need one grid"):
        recorder(q, k, v, call_at(Grid(4, 16, 16), steps=2))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"penalty": -0.1}, "penalty must be a finite number of at least 0, got -0.1"),
        ({"penalty": math.inf}, "penalty must be"),
        ({"epsilon": math.nan}, "epsilon must be"),
        ({"epsilon": "1"}, "epsilon must be"),
        ({"loss": "mse"}, "loss must be one of"),
        ({"cost": "flops"}, "cost must be one of"),
        ({"density": 0}, "density must be"),
    ],
)
def test_fields_out_of_range_raise(changed, message):
    with pytest.raises(ValueError, match=message):
        SparseVDiTSearch(**changed)


def run(pipe, **changed):
    generator = torch.Generator().manual_seed(0)
    return pipe(**{**WAN_CALL, "num_inference_steps": 2, **changed}, generator=generator).frames


def test_search_with_all_heads_full_is_the_dense_run():
    pipe = tiny_wan()
    dense = run(pipe)
    recorder = replace(BLOCKS, epsilon=0).recorder()
    vdit_sparse.apply(pipe, recorder)
    torch.testing.assert_close(run(pipe), dense, atol=1e-4, rtol=1e-4)
    found = recorder.result()
    assert found["transformer.modes"].shape == (2, 2, 2)
    assert (found["transformer.modes"] == 0).all()


def test_search_and_run_of_both_experts(tmp_path):
    pipe = tiny_wan(experts=2)
    search = SparseVDiTSearch(block=64, epsilon=math.inf, cost="blocks")
    recorder = search.recorder()
    vdit_sparse.apply(pipe, recorder)
    run(pipe, num_inference_steps=4)
    found = recorder.result()
    ran = [
        (found[f"{name}.modes"] >= 0).all(-1).all(-1) for name in ("transformer", "transformer_2")
    ]
    assert torch.equal(ran[0], ~ran[1])
    path = tmp_path / "found.safetensors"
    grid, layers, steps = recorder.record.run
    made = written(path, found, search, grid, layers, steps)
    save(replace(made, origin=replace(ORIGIN, model="", config="", scheduler="")))
    vdit_sparse.apply(pipe, SparseVDiTAttention(calibration=str(path)))
    assert run(pipe, num_inference_steps=4).isfinite().all()
    entries = vdit_sparse.summary(pipe).entries
    assert all(0 <= entry.density < 1 for entry in entries)
    assert asdict(search)["stripes"] == Patterns().stripes


def test_target_density_is_reached_by_the_smallest_epsilon():
    search = SparseVDiTSearch(target=0.5, cost="blocks")
    losses = torch.rand(4, 3, 5, 4)
    losses[3] = torch.nan  # a step of the other expert
    densities = torch.tensor([1.0, 0.0, 0.25, 0.25, 0.3])
    modes = search.settle(losses, densities, densities)[:3]
    found = densities[modes]
    assert found.mean() <= 0.5 < found.mean() + 1.0 / found.numel()
    kept = losses[:3].amin(-1)
    assert kept[modes == 0].min() > kept[modes != 0].max()
    sparser = replace(search, target=0.3).settle(losses, densities, densities)[:3]
    assert ((modes != 0) <= (sparser != 0)).all()


def test_a_target_below_all_patterns_ends_without_full_heads():
    search = SparseVDiTSearch(target=0.01, cost="blocks")
    densities = torch.tensor([1.0, 0.2, 0.25, 0.25, 0.3])
    assert (search.settle(torch.rand(3, 4, 4), densities, densities) != 0).all()
