"""The controls of a comparison, the probe, and the table made of its rows."""

from dataclasses import replace

import pytest
import torch

from vdit_sparse.call import Call
from vdit_sparse.eval.compare_table import tables
from vdit_sparse.eval.controls import OracleBlocks, RandomBlocks, counts
from vdit_sparse.eval.decay import report
from vdit_sparse.eval.probe import Probe
from vdit_sparse.grid import Grid

GRID = Grid(5, 16, 16, 30)


def call_at(step=0, grid=GRID):
    return Call(grid, layer=1, layers=2, step=step, steps=4, memory={})


def inputs(device, grid=GRID):
    return torch.randn(3, 2, 2, grid.tokens, 16, device=device)


@pytest.mark.parametrize("density", [0.07, 0.25, 0.333, 1.0])
@pytest.mark.parametrize("nb", [7, 49])
def test_counts_have_the_density_on_average_and_leave_no_row_empty(nb, density, device):
    found = counts(nb, density, device)
    assert found.shape == (1, 1, nb) and found.min() >= 1 and found.max() <= nb
    if density * nb >= 1:
        assert int(found.sum()) == round(density * nb * nb)
        assert found.max() - found.min() <= 1


@pytest.mark.parametrize("control", [RandomBlocks, OracleBlocks])
def test_controls_keep_their_density_and_text(control, device):
    q, k, _ = inputs(device, Grid(5, 16, 16))
    plan = control(block=64, density=0.3).plan(q, k, call_at(grid=Grid(5, 16, 16)))
    assert plan.mask.density() == pytest.approx(0.3, abs=0.003)
    q, k, _ = inputs(device)
    keep = control(block=64, density=0.3).plan(q, k, call_at()).mask.keep()
    assert keep[..., -1, :].all() and keep[..., -1].all()


def test_random_blocks_differ_by_head_and_step_and_repeat_by_seed(device):
    q, k, _ = inputs(device)
    masks = [
        RandomBlocks(block=64, seed=s).plan(q, k, call_at(n)).mask for s, n in [(0, 0), (0, 1)]
    ]
    again = RandomBlocks(block=64).plan(q, k, call_at()).mask
    assert torch.equal(masks[0].keep(), again.keep())
    assert not torch.equal(masks[0].keep(), masks[1].keep())
    assert not torch.equal(again.keep()[0, 0], again.keep()[0, 1])


def test_the_oracle_keeps_more_mass_than_any_random_choice(device):
    q, k, _ = inputs(device, Grid(5, 16, 16))
    q = 3 * q
    weights = (q @ k.mT * 16**-0.5).softmax(-1).unflatten(-1, (-1, 64)).sum(-1)
    mass = weights.unflatten(-2, (-1, 64)).sum(-2)
    call = call_at(grid=Grid(5, 16, 16))
    kept = {
        control: (mass * control(block=64).plan(q, k, call).mask.keep()).sum()
        for control in (OracleBlocks, RandomBlocks)
    }
    assert kept[OracleBlocks] > kept[RandomBlocks]
    best = mass.topk(5, -1).values.sum()
    assert float(kept[OracleBlocks]) == pytest.approx(float(best), rel=1e-4)


def test_a_probe_passes_the_methods_output_on_and_measures_its_error(device):
    q, k, v = inputs(device)
    whole, half = RandomBlocks(block=64, density=1.0), RandomBlocks(block=64, density=0.5)
    probes = [Probe.around(method) for method in (whole, half)]
    out = probes[1](q, k, v, call_at())
    probes[0](q, k, v, call_at())
    assert torch.equal(out, half(q, k, v, call_at()))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert probes[1].mean_error() == pytest.approx(float((out - dense).norm() / dense.norm()))
    assert probes[0].mean_error() < 1e-5 < 0.1 < probes[1].mean_error()


@pytest.mark.parametrize("padding", [0.0, 100.0])
def test_what_stands_in_the_padding_counts_nothing(padding, device):
    qkv, real = inputs(device), GRID.tokens - 20
    qkv[..., real:, :] = padding
    kv_len = torch.tensor([real, real], dtype=torch.int32, device=device)
    padded = replace(call_at(), kv_len=kv_len)
    cut = call_at(grid=replace(GRID, text=GRID.text - 20))
    probe = Probe.around(RandomBlocks(block=64, density=0.5))
    alone = Probe.around(RandomBlocks(block=64, density=0.5))
    probe(*qkv, padded)
    alone(*qkv[..., :real, :], cut)
    assert probe.mean_error() == pytest.approx(alone.mean_error(), rel=1e-4)
    oracle, blocks = OracleBlocks(block=64, density=0.3), real // 64
    whole = oracle.score(*qkv[:2], padded)[..., :blocks, :blocks]
    expected = oracle.score(*qkv[:2, ..., :real, :], cut)[..., :blocks, :blocks]
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=1e-4)


def row(name, psnr, method="x", **more):
    usual = {"density": 0.5, "sparse_density": 0.25, "step_density": 0.25, "seconds": 1.0}
    found = {"name": name, "method": method, "frames": 25, "psnr": [psnr], "ssim": [0.9]}
    return {**found, "error": 0.1, "planning_share": 0.02, **usual, **more}


def test_a_table_puts_the_controls_beside_the_row_of_their_density():
    rows = [
        {"name": "dense", "method": "None", "frames": 25, "seconds": 2.0},
        row("draft", 27.0),
        row("RandomBlocks", 20.0, "RandomBlocks(refresh='each', density=0.25, seed=0)"),
        row("RandomBlocks", 18.0, "RandomBlocks(refresh='once', density=0.25, seed=0)"),
        row("OracleBlocks", 30.0, "OracleBlocks(refresh='each', density=0.25)"),
        row("OracleBlocks", 31.0, "OracleBlocks(refresh='each', density=0.3)"),
    ]
    lines = tables(rows).splitlines()
    assert lines[0] == "### 25 frames"
    assert lines[4].startswith("| dense | 1 |")
    assert "| **27.00** | 20.00 (fixed: 18.00) | 30.00 | 0.900 | 0.100 | 2.0% |" in lines[5]
    assert len(lines) == 6


def test_decay_adds_up_and_says_what_a_mask_drops():
    grid = Grid(2, 8, 16)
    mass = torch.full((1, 1, 4, 4), 1 / 16)
    keep = torch.eye(4, dtype=torch.bool)[None, None]
    lines = report([(grid, mass, keep)]).splitlines()
    assert lines[1].split() == ["0", "0.500", "0.500", "0.250"]
    assert lines[2].split() == ["1", "0.500", "0.500", "0.000"]
    assert lines[3].endswith("0.750, 0.750, 0.750, 0.750")
