"""The calibration driver on tiny pipelines: every prompt with every seed, and what is written."""

import warnings
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import ClassVar

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import vdit_sparse
from tests.tiny_models import WAN_CALL, tiny_wan, wan_transformer
from tests.tiny_models.catalogue import TINY
from vdit_sparse.calibration import CalibratedAttention, load
from vdit_sparse.eval.calibrate import calibrate, density_of, runs_of
from vdit_sparse.eval.calibrators import CALIBRATORS
from vdit_sparse.grid import Grid
from vdit_sparse.method import SparseAttention
from vdit_sparse.methods import METHODS, RadialAttention
from vdit_sparse.pipelines.attach import origin_of
from vdit_sparse.pipelines.hook import SparseAttnProcessor

SETTINGS = {
    name: value for name, value in WAN_CALL.items() if name not in ("prompt", "output_type")
}
OWN_ARGUMENTS = ("prompt", "output_type", "return_dict")


@dataclass(frozen=True, kw_only=True)
class FakeRecorder(SparseAttention):
    """Keeps the first step's queries of the first layer; breaks at a step, if told."""

    breaks_at: int | None = None
    queries: list = field(default_factory=list, compare=False)

    def plan(self, q, k, call):
        raise NotImplementedError

    def attend(self, q, k, v, call):
        if call.step == self.breaks_at:
            raise ArithmeticError("no")
        if call.step == call.layer == 0:
            self.queries.append(q.clone())
        return scaled_dot_product_attention(q, k, v)

    def result(self):
        return {"transformer.queries": torch.stack(self.queries)}


@dataclass(frozen=True, kw_only=True)
class FakeSearch:
    """One recorder for all who ask."""

    block: int = 64
    share: float = 0.5
    method: ClassVar = CalibratedAttention
    made: ClassVar[SparseAttention]

    def recorder(self):
        return self.made


@pytest.fixture
def search():
    FakeSearch.made = FakeRecorder()
    return FakeSearch(share=0.25)


@pytest.fixture
def pipe(device):
    return tiny_wan().to(device)


def is_stock(pipe) -> bool:
    modules = pipe.transformer.modules()
    processors = [getattr(module, "processor", None) for module in modules]
    return not any(isinstance(processor, SparseAttnProcessor) for processor in processors)


def test_the_file_says_what_was_done(pipe, search, tmp_path):
    out = tmp_path / "x.safetensors"
    made = calibrate(pipe, search, ["a cat", "a dog"], [0, 7], out=out, **SETTINGS)
    read = load(out)
    assert made.path == read.path == str(out)
    assert read.method == "CalibratedAttention" and read.fields == {"block": 64, "share": 0.25}
    assert read.origin == origin_of(pipe, "transformer", pipe.transformer) and read.origin.config
    assert read.grid == Grid(5, 8, 8) and (read.layers, read.steps) == (2, 3)
    assert read.prompts == ("a cat", "a dog") and read.seeds == (0, 7)
    assert read.versions["torch"] == version("torch")
    assert read.versions["vdit_sparse"] == vdit_sparse.__version__
    assert read.versions.keys() == {"vdit_sparse", "torch", "triton", "diffusers"}
    assert torch.equal(read.tensors["transformer.queries"], made.tensors["transformer.queries"])
    assert is_stock(pipe)


def test_the_folder_of_calibrations_is_not_written_down(search, tmp_path):
    tiny_wan().save_pretrained(tmp_path)
    (tmp_path / "calibrations").mkdir()
    pipe = vdit_sparse.load_pipeline(tmp_path, device="cpu", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert origin_of(pipe, "transformer", pipe.transformer).calibrations
    made = calibrate(pipe, search, ["a"], [0], out=tmp_path / "x.safetensors", **SETTINGS)
    assert made.origin.calibrations == "" and made.origin.model == tmp_path.name


def test_every_prompt_runs_with_every_seed_from_its_noise(pipe, search, tmp_path):
    seen = []
    calibrate(
        pipe,
        search,
        ["a cat", "a dog"],
        [3, 4],
        out=tmp_path / "x",
        on_step=lambda *at: seen.append(at),
        **SETTINGS,
    )
    assert seen == [(run, step, 3) for run in range(4) for step in (1, 2, 3)]
    # At the first step of a run q of the first layer depends on the noise, not on the prompt; two
    # calls a run, one for each guidance branch.
    queries = [*search.made.queries]
    assert len(queries) == 8
    assert torch.equal(queries[0], queries[4]) and torch.equal(queries[2], queries[6])
    assert not torch.equal(queries[0], queries[2])
    search.made.queries.clear()
    vdit_sparse.apply(pipe, search.made)
    noise = torch.Generator("cpu").manual_seed(4)
    pipe(prompt="a dog", generator=noise, output_type="latent", **SETTINGS)
    assert torch.equal(search.made.queries[0], queries[6])


@dataclass(frozen=True, kw_only=True)
class TwicePassedRecorder(FakeRecorder):
    """Asks for two passes, and writes down how many queries it had when each began."""

    passes: ClassVar = 2
    begun: list = field(default_factory=list, compare=False)

    def begin(self, number):
        self.begun.append((number, len(self.queries)))


def test_a_recorder_may_ask_for_several_passes(pipe, search, tmp_path):
    FakeSearch.made = TwicePassedRecorder()
    seen = []
    calibrate(
        pipe,
        search,
        ["a cat", "a dog"],
        [3],
        out=tmp_path / "x",
        on_step=lambda *at: seen.append(at),
        **SETTINGS,
    )
    runs = runs_of(search, ["a cat", "a dog"], [3])
    assert runs == 4 and seen == [(run, step, 3) for run in range(runs) for step in (1, 2, 3)]
    assert search.made.begun == [(0, 0), (1, 4)]
    first, second = (torch.stack(x) for x in (search.made.queries[:4], search.made.queries[4:]))
    assert torch.equal(first, second)
    FakeSearch.made = FakeRecorder()
    assert runs_of(search, ["a cat", "a dog"], [3]) == 2


def test_after_an_error_attention_is_stock_and_nothing_is_written(pipe, tmp_path):
    FakeSearch.made = FakeRecorder(breaks_at=1)
    vdit_sparse.apply(pipe, RadialAttention(block=64))
    with pytest.raises(ArithmeticError):
        calibrate(pipe, FakeSearch(), ["a"], [0], out=tmp_path / "x.safetensors", **SETTINGS)
    assert is_stock(pipe) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("prompts", "seeds"), [([], [0]), (["a"], [])])
def test_without_prompts_or_seeds_nothing_runs(pipe, search, tmp_path, prompts, seeds):
    with pytest.raises(ValueError, match=f"got {len(prompts)} prompts and {len(seeds)} seeds"):
        calibrate(pipe, search, prompts, seeds, out=tmp_path / "x", **SETTINGS)
    assert not search.made.queries


def test_nan_is_not_calibrated_on(pipe, search, tmp_path):
    with torch.no_grad():
        pipe.transformer.proj_out.bias.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="latents of 'a' hold NaN"):
        calibrate(pipe, search, ["a"], [0], out=tmp_path / "x", **SETTINGS)
    assert not list(tmp_path.iterdir())


def test_experts_of_different_configurations_are_refused(search, tmp_path):
    pipe = tiny_wan(experts=2)
    pipe.transformer_2 = wan_transformer(3, 16)
    with pytest.raises(ValueError, match="experts of this pipeline differ.*transformer_2"):
        calibrate(pipe, search, ["a"], [0], out=tmp_path / "x", **SETTINGS)


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("name", CALIBRATORS)
def test_what_is_found_runs(device, name, experts, tmp_path):
    pipe = tiny_wan(experts=experts).to(device)
    out = tmp_path / "x.safetensors"
    with torch.inference_mode():
        made = calibrate(pipe, CALIBRATORS[name](block=64), ["a", "b"], [0], out=out, **SETTINGS)
    assert made.method == CALIBRATORS[name].method.__name__
    found = {key.split(".")[0] for key in load(out).tensors}
    assert sorted(found) == ["transformer", "transformer_2"][:experts]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method = METHODS[name](calibration=str(out))
        density = density_of(pipe, method, "c", 1, **SETTINGS)
    assert 0 < density <= 1


@pytest.mark.parametrize("entry", ["qwen-image", "stable-diffusion-3.5"])
@pytest.mark.parametrize("name", CALIBRATORS)
def test_prompts_of_any_length_can_be_searched_and_run(entry, name, tmp_path):
    tiny = TINY[entry]()
    settings = {key: tiny.call[key] for key in tiny.call if key not in OWN_ARGUMENTS}
    search = CALIBRATORS[name](block=64, density=0.5)
    out, prompts = tmp_path / "x.safetensors", ["a cat", "a white dog runs away"]
    with torch.no_grad():
        made = calibrate(tiny.pipe, search, prompts, [0], out=out, **settings)
        assert made.grid == Grid(1, 16, 24)
        method = METHODS[name](calibration=str(out))
        longer = "a white dog runs away over the hills"
        assert 0 < density_of(tiny.pipe, method, longer, 1, **settings) <= 1


@pytest.mark.parametrize("entry", ["hunyuan-video", "mochi"])
@pytest.mark.parametrize("name", CALIBRATORS)
def test_a_recorder_goes_on_with_stock_attention_where_text_is_padded(entry, name, tmp_path):
    tiny = TINY[entry]()
    dense = {"sparse-vdit": {"epsilon": 0.0, "penalty": 0.0, "cost": "blocks"}, "paro": {}}
    call = {**tiny.call, **tiny.batch}
    runs = []
    for recorder in (None, CALIBRATORS[name](block=64, **dense[name]).recorder()):
        if recorder:
            vdit_sparse.apply(tiny.pipe, recorder)
        with torch.no_grad():
            runs.append(tiny.pipe(**call, generator=torch.Generator().manual_seed(0))[0])
    torch.testing.assert_close(runs[1], runs[0], atol=tiny.tolerance, rtol=0)


def test_the_density_of_a_run(pipe):
    method = RadialAttention(block=64, dense_steps=1, decay=0.01)
    seen = []
    density = density_of(pipe, method, "a", 0, on_step=lambda *at: seen.append(at), **SETTINGS)
    assert is_stock(pipe) and seen == [(1, 3), (2, 3), (3, 3)]
    vdit_sparse.apply(pipe, method)
    pipe(**WAN_CALL)
    ran = vdit_sparse.summary(pipe)
    assert density == ran.density < 1
    assert (ran.grid, ran.layers, ran.steps) == (Grid(5, 8, 8), 2, 3)
