"""The bar's arithmetic, and that uniform settings keep to the density they are listed for."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from tests.tiny_models import WAN_CALL, tiny_wan
from vdit_sparse.call import Call, Note
from vdit_sparse.eval import leaderboard, tune_bar
from vdit_sparse.eval.confidence import interval
from vdit_sparse.eval.tune_bar import HELD_OUT, TUNING, prompts_of
from vdit_sparse.eval.tune_samples import Samples
from vdit_sparse.eval.uniform import sparse_shares, uniform
from vdit_sparse.grid import Grid
from vdit_sparse.methods import AdaSpaAttention, DraftAttention, PAROAttention, RadialAttention

GRID, STEPS, DENSITY = Grid(7, 16, 28), 16, 0.25


def test_interval_is_that_of_student():
    middle, half = interval([1.0, 2.0, 3.0])
    assert middle == 2 and half == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert interval([1.0] * 32) == (1.0, 0.0)


def test_tuning_and_held_out_prompts_are_apart():
    held, tuning = prompts_of(HELD_OUT), prompts_of(TUNING)
    assert len(held) == len(set(held)) == 32 and not set(held) & set(tuning)


def test_shares_make_the_density_of_the_run():
    for dense, share in sparse_shares(DENSITY, STEPS):
        assert (dense + (STEPS - dense) * share) / STEPS == pytest.approx(DENSITY, abs=1e-3)


def density_of(method, device) -> float:
    """Of a run of one layer, with its dense and search steps."""
    q = torch.randn(1, 2, GRID.tokens, 16, device=device)
    memory, total = {}, 0.0
    for step in range(STEPS):
        call = Call(GRID, 0, 1, step, STEPS, memory, note=Note())
        method(q, q, q, call, dense=lambda q, k, v: q)
        total += 1.0 if method.is_dense(call) else float(call.note.density)
    return total / STEPS


def test_uniform_settings_keep_to_the_density(device):
    found = list(uniform(DENSITY, GRID, STEPS, {}))
    assert {name for name, _ in found} == {"adaspa", "rettention", "draft"}
    assert len(found) == len({(name, repr(method)) for name, method in found})
    first = {(name, method.dense_steps): method for name, method in reversed(found)}
    for (name, dense), method in first.items():
        if name != "draft" and dense < 2:
            small = replace(method, backend=None)
            assert DENSITY - 0.04 <= density_of(small, device) <= DENSITY + 0.01, method


def test_the_bar_is_measured_on_a_tiny_model(tmp_path, monkeypatch, device):
    from vdit_sparse.eval.tune import Target, tune
    from vdit_sparse.eval.tune_record import TuneSearch

    names = ("height", "width", "num_frames", "num_inference_steps", "max_sequence_length")
    settings = {name: WAN_CALL[name] for name in names}
    pipe = tiny_wan().to(device)
    file = tmp_path / "x.safetensors"
    quick = {"search": TuneSearch(densities=(0.0,), order_steps=1), "effects": "none", "rounds": 0}
    tune(pipe, ["a cat"], [0], Target(density=0.5), out=file, **quick, **settings)
    pipe.generation = {**settings, "fps": 8}
    monkeypatch.setattr(tune_bar, "load_pipeline", lambda model: pipe)
    monkeypatch.setattr(tune_bar, "prompts_of", lambda names: ["a cat", "a dog"])
    chosen = [("radial", RadialAttention(block=64)), ("draft", DraftAttention(block=64))]
    monkeypatch.setattr(tune_bar, "uniform", lambda *_: iter(chosen))
    asked = SimpleNamespace(
        calibration=file, density=0.5, out=tmp_path, prompts=2, batch=2, no_calibrations=True
    )
    bar = tune_bar.measure(SimpleNamespace(**vars(asked), model=None))
    assert bar["runs"].keys() == {"tuned", "radial", "draft"} and bar["prompts"] == 2
    ours, theirs = (bar["runs"][name]["psnr"] for name in ("tuned", bar["best"]))
    assert bar["gain"] == pytest.approx((sum(ours) - sum(theirs)) / 2)
    assert bar["uniform"][0]["error"] <= bar["uniform"][1]["error"]
    assert f"Tuned minus {bar['best']}: {bar['gain']:.2f}" in tune_bar.table(bar)

    # Cut off in its last row and started again, it measures that row alone.
    file = tmp_path / "rows.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    ran = []
    monkeypatch.setattr(Samples, "psnr", lambda self, method, _: ran.append(method) or [1.0, 3.0])
    monkeypatch.setattr(Samples, "latents", None)
    again = tune_bar.measure(SimpleNamespace(**vars(asked), model=None))
    assert [repr(method) for method in ran] == [list(bar["runs"].values())[-1]["method"]]
    assert again["runs"]["tuned"] == bar["runs"]["tuned"] and len(lines) == 5
    assert len(file.read_text().splitlines()) == 5


def test_the_leaderboard_is_sorted_and_marks_the_tuner():
    rows = [
        {"name": "dense", "method": "None", "seconds": 1.0},
        {"name": "adaspa", "method": repr(AdaSpaAttention(density=0.25, refresh=(4, 9)))},
        {"name": "tuned", "method": "TunedAttention(calibration='/secret/x')"},
    ]
    for row, density in zip(rows[1:], (0.4, 0.5), strict=True):
        row |= {"density": density, "psnr": [20.0, 22.0], "ssim": [0.5, 0.7]}
    lines = leaderboard.table(rows).splitlines()
    assert lines[2].startswith("| **tuned** | 0.500 | 21.00 ± ") and "/secret" not in lines[2]
    assert lines[3].endswith("| 0.600 | `density=0.25`, `refresh=(4, 9)` |") and len(lines) == 4
    paro = PAROAttention(calibration="/secret/y", precision="int8_fp8")
    rows[1] |= {"name": "paro", "method": repr(paro), "target": 0.35}
    shown = leaderboard.table(rows[1:2])
    assert shown.endswith("| calibrated for 0.35, `precision='int8_fp8'` |")
    assert leaderboard.run_densities(16) == [0.625, 0.5125, 0.4375, 0.3625]


def test_a_leaderboard_goes_on_where_it_was_cut_off(tmp_path, device, monkeypatch):
    from vdit_sparse.eval.compare import Trial

    names = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
    settings = {name: WAN_CALL[name] for name in names} | {"max_sequence_length": 16}
    pipe = tiny_wan().to(device)
    pipe.generation = {**settings, "fps": 8}
    prepared = []
    every = [
        Trial(name, kind(block=64, density=0.5), 0.5, partial(prepared.append, name))
        for name, kind in (("draft", DraftAttention), ("adaspa", AdaSpaAttention))
    ]
    monkeypatch.setattr(leaderboard, "load_pipeline", lambda: pipe)
    monkeypatch.setattr(leaderboard, "prompts_of", lambda names: ["a cat", "a dog"])
    asked = SimpleNamespace(out=tmp_path, prompts=2, tuned=[])
    for known in (every[:1], every):
        monkeypatch.setattr(leaderboard, "trials", lambda *_, known=known: iter(known))
        page = leaderboard.board(asked)
        assert page.count("\n| draft |") == 1
    assert page.count("\n| adaspa |") == 1 and "2 prompts of the grammar" in page
    # Dense attention and both methods: nothing was run, nor calibrated for, twice.
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 3
    assert prepared == ["draft", "adaspa"]
