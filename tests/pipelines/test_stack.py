"""Methods beside compilation, offload, adapters, caches, guiders and quantised weights.

One test a cell of docs/compatibility.md: stock diffusers with the feature is what a dense method
with it has to equal, put on in either order.
"""

from functools import cache
from importlib import import_module

import pytest
import torch
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from peft import LoraConfig, inject_adapter_in_model

from tests.pipelines import stack_table
from tests.pipelines.stack_features import FEATURES
from tests.pipelines.stack_outcomes import OUTCOMES, ROWS, outcome_of
from tests.tiny_models.catalogue import TINY
from tests.tiny_models.parts import Tiny
from vdit_sparse import AdaSpaAttention, apply, remove, summary
from vdit_sparse.pipelines.attach import denoisers_of
from vdit_sparse.pipelines.checkpoints import checkpoints
from vdit_sparse.pipelines.families import FAMILIES

DENSE = AdaSpaAttention(dense_steps=10_000)
SPARSE = AdaSpaAttention(dense_steps=0, block=64, dense_search=False)
# Cross-attention through the dispatcher; joint, text first. The other rows are of the same kinds.
QUICK = ("wan", "flux")
ALSO_QUICK = (("fuse", "cogvideox"), ("backend", "cogvideox"))
LONG = ("compile", "cache-dit", "int8", "fp8")


def cells():
    for feature in FEATURES:
        for entry in ROWS:
            quick = entry in QUICK and feature not in LONG or (feature, entry) in ALSO_QUICK
            marks = () if quick else pytest.mark.slow
            yield pytest.param(feature, entry, id=f"{feature}-{entry}", marks=marks)


@torch.no_grad()
def run(tiny: Tiny, steps: int, **changes) -> torch.Tensor:
    call = {**tiny.call, "num_inference_steps": steps, **changes}
    out = tiny.pipe(**call, generator=torch.Generator().manual_seed(0))[0]
    return torch.stack(list(out))


@cache
def plain(entry: str, steps: int) -> torch.Tensor:
    return run(TINY[entry](), steps)


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch):
    """What diffusers keeps for the whole process, and compiled code."""
    registry = dict(AttentionProcessorRegistry._registry)
    monkeypatch.setattr(AttentionProcessorRegistry, "_registry", registry)
    torch._dynamo.reset()
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "entry"), list(cells()))
def test_cell(name, entry, tmp_path):
    feature, outcome = FEATURES[name], outcome_of(name, entry)
    if feature.package:
        pytest.importorskip(feature.package)
    one, other = TINY[entry](), TINY[entry]()
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    if outcome.kind in ("absent", "stock fails"):
        with pytest.raises(Exception, match=outcome.words):
            feature.put(one.pipe, tmp_path / "one")
            run(one, feature.steps)
        return
    without = plain(entry, feature.steps)
    feature.put(one.pipe, tmp_path / "one")
    wanted = run(one, feature.steps)
    graphs = one.pipe.graphs.frame_count if name == "compile" else 0
    if feature.effect:
        assert torch.equal(wanted, without) == (outcome.kind == "no effect")
    sparse = feature_before_method(one, wanted, feature)
    torch._dynamo.reset()
    apply(other.pipe, DENSE)
    feature.put(other.pipe, tmp_path / "other")
    feature_after_method(other, wanted, sparse, feature, outcome)
    if graphs:  # dense or sparse, as many as of stock attention; experts share none, as runs do not
        assert other.pipe.graphs.frame_count == graphs * len(denoisers_of(other.pipe))
    if feature.package != "cache_dit":  # it goes with the method, and does not come off before
        remove(other.pipe)
        close(run(other, feature.steps), wanted, feature)


def feature_before_method(tiny: Tiny, wanted: torch.Tensor, feature) -> torch.Tensor:
    apply(tiny.pipe, DENSE)
    close(run(tiny, feature.steps), wanted, feature)
    calls = summary(tiny.pipe).calls
    apply(tiny.pipe, SPARSE)
    sparse = run(tiny, feature.steps)
    done = summary(tiny.pipe)
    assert done.calls == calls > 0 and 0 < done.sparse_density < 1
    assert sparse.isfinite().all() and not torch.equal(sparse, wanted)
    remove(tiny.pipe)
    close(run(tiny, feature.steps), wanted, feature)
    return sparse


def feature_after_method(tiny: Tiny, wanted, sparse, feature, outcome) -> None:
    if outcome.kind in ("apply again", "first"):
        with pytest.raises(RuntimeError, match=outcome.words):
            run(tiny, feature.steps)
    if outcome.kind == "first":
        return
    if outcome.kind == "works":
        close(run(tiny, feature.steps), wanted, feature)
    apply(tiny.pipe, SPARSE)
    close(run(tiny, feature.steps), sparse, feature)


def close(one: torch.Tensor, other: torch.Tensor, feature) -> None:
    torch.testing.assert_close(one, other, atol=feature.tolerance, rtol=0)


# Preset -> tiny model of its family.
FEW_STEP_PRESETS = {
    "draft-flux-few-steps": "flux",
    "draft-flux2-few-steps": "flux2-klein",
    "draft-z-image-few-steps": "z-image",
    "radial-wan2.1-few-steps": "wan",
}
WITHOUT_ADAPTERS = [x for x, outcome in OUTCOMES["lora"].items() if outcome.kind == "absent"]
FEW = [pytest.param(x, marks=() if x in QUICK else pytest.mark.slow) for x in ROWS]


@pytest.mark.parametrize("entry", WITHOUT_ADAPTERS)
def test_where_diffusers_loads_no_lora_peft_itself_puts_one_in(entry):
    tiny = TINY[entry]()
    model = tiny.pipe.transformer
    apply(tiny.pipe, DENSE)
    torch.manual_seed(0)
    inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False), model
    )
    dense = run(tiny, 2)
    remove(tiny.pipe)
    assert torch.equal(run(tiny, 2), dense) and not torch.equal(dense, plain(entry, 2))
    apply(tiny.pipe, SPARSE)
    assert run(tiny, 2).isfinite().all() and summary(tiny.pipe).sparse_density < 1


@pytest.mark.parametrize("steps", [4, 8])
@pytest.mark.parametrize("entry", FEW)
def test_few_steps_without_guidance_have_dense_ends(entry, steps):
    check_dense_ends(entry, AdaSpaAttention(block=64, dense_steps=1, last_dense_steps=1), steps)


@pytest.mark.parametrize("steps", [4, 8])
@pytest.mark.parametrize("preset", FEW_STEP_PRESETS)
def test_presets_for_few_steps_have_dense_ends(preset, steps):
    check_dense_ends(FEW_STEP_PRESETS[preset], preset, steps)


def check_dense_ends(entry: str, method, steps: int) -> None:
    tiny = TINY[entry]()
    scales = ("guidance_scale", "true_cfg_scale")
    changes = {name: 1.0 for name in scales if name in tiny.pipe.stock_signature.parameters}
    apply(tiny.pipe, method)
    out = run(tiny, steps, **changes)
    done = summary(tiny.pipe)
    assert out.isfinite().all()
    if not hasattr(tiny.pipe, "guider"):
        assert len({entry.branch for entry in done.entries}) == 1
    # A preset may leave layers dense in every step.
    sparse = {entry.step for entry in done.entries if not entry.dense}
    assert sparse == set(range(1, steps - 1))
    layers = {entry.layer for entry in done.entries if not entry.dense}
    assert {entry.step for entry in done.entries if entry.dense and entry.layer in layers} == {
        0,
        steps - 1,
    }


def test_every_checkpoint_for_few_steps_has_a_preset():
    few = {name for one in checkpoints() if one.steps < 10 for name in one.presets}
    assert all(one.presets for one in checkpoints() if one.steps < 10)
    assert few | {"radial-wan2.1-few-steps"} == FEW_STEP_PRESETS.keys()


def test_every_family_has_a_row():
    built = {type(m).__name__ for x in ROWS for m in denoisers_of(TINY[x]().pipe).values()}
    assert built == FAMILIES.keys()
    assert OUTCOMES.keys() <= FEATURES.keys()
    assert all(row.keys() <= ROWS.keys() for row in OUTCOMES.values())


def test_the_table_is_what_the_outcomes_say():
    assert stack_table.FILE.read_text() == stack_table.page(), (
        "docs/compatibility.md is stale: run python -m tests.pipelines.stack_table"
    )


def test_every_test_named_in_the_table_is_there():
    for test in stack_table.ELSEWHERE.values():
        module, name = test.split("::")
        assert hasattr(import_module(module), name)
