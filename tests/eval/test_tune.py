"""The whole search on a tiny pipeline: targets, weights, what is written and left behind."""

from dataclasses import replace

import pytest
import torch

from tests.tiny_models import WAN_CALL, tiny_wan
from vdit_sparse.calibration import load
from vdit_sparse.eval.tune import POWERS, TOGETHER, Target, _refine, tune
from vdit_sparse.eval.tune_effect import Disturbed, _solve, weights
from vdit_sparse.eval.tune_problem import Weight
from vdit_sparse.eval.tune_record import TuneSearch
from vdit_sparse.eval.tune_samples import Samples, error_db
from vdit_sparse.methods import RadialAttention
from vdit_sparse.pipelines.attach import apply
from vdit_sparse.pipelines.hook import SparseAttnProcessor
from vdit_sparse.tuned import TunedAttention

SETTINGS = {
    name: value for name, value in WAN_CALL.items() if name not in ("prompt", "output_type")
}
SEARCH = TuneSearch(densities=(0.0, 0.3), order_steps=1)
QUICK = {"search": SEARCH, "effects": "none", "rounds": 0, "batch": 2}


@pytest.fixture
def pipe(device):
    return tiny_wan().to(device)


def samples(pipe, batch=1) -> Samples:
    return Samples(pipe, ["a cat", "a dog"], [0, 7], SETTINGS, batch)


def test_a_density_is_reached_and_the_error_is_that_of_the_file(pipe, tmp_path):
    apply(pipe, RadialAttention())
    out, told = tmp_path / "x.safetensors", []
    target = Target(density=0.6)
    found = tune(
        pipe,
        ["a cat", "a dog"],
        [0],
        target,
        out=out,
        tell=lambda *x: told.append(x),
        **QUICK,
        **SETTINGS,
    )
    assert found.density <= 0.6 and found.error <= found.unweighted
    modules = [getattr(x, "processor", None) for x in pipe.transformer.modules()]
    assert not any(isinstance(x, SparseAttnProcessor) for x in modules)
    assert load(out).tensors.keys() == found.calibration.tensors.keys()
    both = Samples(pipe, ["a cat", "a dog"], [0, 0], SETTINGS, 2)
    dense = both.latents(None)
    error = error_db(both.latents(TunedAttention(calibration=str(out))), dense)
    assert error == pytest.approx(found.error, abs=1e-3)
    assert both.density() == pytest.approx(found.density)
    assert {what for what, _, _ in told} == {"measuring heads", "refining"}
    assert all(0 < done <= total for _, done, total in told)


def test_a_psnr_is_reached_at_the_lowest_density(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr("vdit_sparse.eval.tune_problem.HALVINGS", 2)
    out = tmp_path / "x.safetensors"
    found = tune(pipe, ["a cat"], [0], Target(psnr=52.0), out=out, **QUICK, **SETTINGS)
    assert found.reached >= 52 and found.density < 1
    one = Samples(pipe, ["a cat"], [0], SETTINGS)
    (psnr,) = one.psnr(TunedAttention(calibration=str(out)), one.frames(None))
    assert psnr == pytest.approx(found.reached, abs=0.5)


def test_a_speedup_is_reached_at_the_highest_density(pipe, tmp_path, monkeypatch):
    """With a clock that goes by the density, for that of this machine is not to be relied on."""
    monkeypatch.setattr("vdit_sparse.eval.tune_problem.HALVINGS", 4)

    def seconds(samples, method):
        samples.latents(method)
        return 10.0 if method is None else 10.0 * samples.density()

    monkeypatch.setattr(Samples, "seconds", seconds)
    out = tmp_path / "x.safetensors"
    found = tune(pipe, ["a cat"], [0], Target(speedup=1.3), out=out, **QUICK, **SETTINGS)
    assert found.reached >= 1.3 and 1 / found.density == pytest.approx(found.reached)
    # A head's step more, of three steps, two layers and its heads, would be too much.
    heads = pipe.transformer.config.num_attention_heads
    assert found.density > 1 / 1.3 - 1 / 16 - 1 / (3 * 2 * heads)


def test_a_speedup_out_of_reach_is_said_before_the_weights_are_measured(pipe, tmp_path):
    out, told = tmp_path / "x.safetensors", []
    settings = {**QUICK, "effects": "head", **SETTINGS, "tell": lambda *x: told.append(x[0])}
    with pytest.raises(ValueError, match=r"The speed-up at density 0\.\d+ is .*, expected 900"):
        tune(pipe, ["a cat"], [0], Target(speedup=900), out=out, **settings)
    assert not out.exists() and set(told) == {"measuring heads"}


def test_a_density_that_no_schedule_has_is_said_at_once(pipe, tmp_path):
    told = []
    settings = {**QUICK, **SETTINGS, "tell": lambda *x: told.append(x)}
    with pytest.raises(ValueError, match=r"of 3 steps has a density of at least 0\.333, for 1 of"):
        tune(pipe, ["a cat"], [0], Target(density=0.2), out=tmp_path / "x", **settings)
    assert not told


@pytest.mark.parametrize("given", [{}, {"density": 0.2, "psnr": 30}, {"psnr": -1}, {"speedup": 1}])
def test_bad_targets(given):
    with pytest.raises(ValueError, match=r"Expected one of|must be above"):
        Target(**given)


class Toy:
    """Its error is known of every weight: least where errors are alike and layers count."""

    def __init__(self):
        self.seen = []

    def error(self, weight, density):
        self.seen.append(weight)
        return abs(weight.together - 0.9) + float((weight.head.log() - 1).abs().mean())


def test_refining_takes_the_best_of_all_that_it_tries():
    flat, told, toy = Weight.ones(4, 3, 2), [], Toy()
    start = replace(flat, head=flat.head * 3)
    best = _refine(toy, start, 0.5, 20, lambda *x: told.append(x))
    errors = [Toy().error(each, 0.5) for each in toy.seen]
    assert Toy().error(best, 0.5) == min(errors) < min(errors[: len(TOGETHER)])
    # What is alike first, then powers of the best, then changes to the best so far.
    assert [each.together for each in toy.seen[:4]] == [*TOGETHER, 1.0]
    assert len(toy.seen) == len(TOGETHER) + len(POWERS) + 20 == told[-1][1] == told[-1][2]
    assert all(0 <= each.together <= 1 for each in toy.seen)
    without = Toy()
    _refine(without, flat, 0.5, 0, lambda *_: None)
    assert len(without.seen) == len(TOGETHER)


def test_without_prompts_it_says_so(pipe, tmp_path):
    with pytest.raises(ValueError, match="Tuning needs prompts"):
        tune(pipe, [], [0], Target(density=0.5), out=tmp_path / "x", **QUICK, **SETTINGS)


def test_both_experts_get_a_schedule(device, tmp_path):
    pipe = tiny_wan(experts=2).to(device)
    out = tmp_path / "x.safetensors"
    tune(pipe, ["a cat"], [0], Target(density=0.8), out=out, **QUICK, **SETTINGS)
    found = load(out)
    steps = [found.tensor("step", name).tolist() for name in ("transformer", "transformer_2")]
    assert sorted(sum(steps, [])) == [0, 1, 2] and all(steps)
    assert found.tensor("dense", "transformer_2")[0].all()


def test_batches_give_the_same_samples(pipe):
    one, two = (samples(pipe, batch).latents(None) for batch in (1, 2))
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    assert error_db(one, one) == -100
    assert error_db(1.1 * one, one) == pytest.approx(-20, abs=1e-3)


def test_only_the_wanted_heads_are_disturbed(pipe):
    trial = Disturbed(steps=(1,), layers=(0,), heads=(1,))
    both = samples(pipe, 2)
    moved = both.latents(trial) - both.latents(None)
    assert moved.abs().max() > 0
    ((place, error),) = trial.errors.items()
    assert place == (1, 0) and error[0] == 0 and error[1] > 0


def test_weights_have_the_shape_of_the_run(pipe):
    both = samples(pipe, 2)
    dense, runs = both.latents(None), []
    heads = pipe.transformer.config.num_attention_heads
    at, of = weights(both, dense, (3, 2, heads), "layer", lambda *x: runs.append(x))
    assert at.shape == (3,) and of.shape == (2, heads) and runs[-1] == (5, 5)
    assert (at > 0).all() and (of > 0).all()
    assert torch.equal(of, of[:, :1].expand_as(of))


def test_effects_that_are_products_are_found_again():
    at, of = torch.rand(4, dtype=torch.float64) + 0.1, torch.rand(2, 3, dtype=torch.float64) + 0.1
    single = torch.rand(4, 2, 3, dtype=torch.float64)
    steps = single * torch.eye(4, dtype=torch.float64)[:, :, None, None]
    heads = single * torch.eye(6, dtype=torch.float64).view(6, 1, 2, 3)
    error = torch.cat([steps, heads])
    effect = (error * at[:, None, None] * of).sum((1, 2, 3))
    found = _solve(effect, error, 4)
    weight = found[0][:, None, None] * found[1]
    torch.testing.assert_close(weight, at[:, None, None] * of, rtol=1e-3, atol=1e-6)
