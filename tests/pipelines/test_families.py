"""What every model family promises: the same numbers as stock diffusers, and every method on it."""

import ast
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from tests.pipelines.family_cases import method_for
from tests.tiny_models.catalogue import TINY, VARIANTS
from tests.tiny_models.parts import Tiny
from vdit_sparse import METHODS, AdaSpaAttention, apply, load_pipeline, remove, summary
from vdit_sparse.pipelines.families import DENOISERS, FAMILIES, family_of
from vdit_sparse.pipelines.load import PIPELINES
from vdit_sparse.pipelines.processor import SparseAttnProcessor
from vdit_sparse.pipelines.report import Summary

DENSE = AdaSpaAttention(dense_steps=10_000)
OWN = [name for name in TINY if name not in VARIANTS]
KEPT_RUNS = [(entry, name) for entry in TINY for name in ("draft", "paro")]
KEPT_RUNS += [(entry, "radial") for entry in OWN]
METHOD_RUNS = [(entry, name) for entry in OWN for name in METHODS]
METHOD_RUNS += [(entry, "adaspa") for entry in TINY if entry in VARIANTS]
pytestmark = pytest.mark.filterwarnings("ignore::vdit_sparse.calibration.CalibrationWarning")


@dataclass(frozen=True)
class Case:
    tiny: Tiny
    stock: torch.Tensor
    dense: Summary
    heads: int

    def run(self, method=None, **changes) -> torch.Tensor:
        if method is not None:
            apply(self.tiny.pipe, method)
        return run(self.tiny.pipe, {**self.tiny.call, **changes})


@torch.no_grad()
def run(pipe: DiffusionPipeline, call: dict) -> torch.Tensor:
    out = pipe(**call, generator=torch.Generator().manual_seed(0))[0]
    return torch.stack(list(out))


@cache
def build(name: str) -> Case:
    tiny = TINY[name]()
    stock = run(tiny.pipe, tiny.call)
    queries = []
    layer = next(iter(layers_of(tiny.pipe)))
    apply(tiny.pipe, DENSE)
    processor = layer.processor
    wrapped = processor.attend
    processor.attend = lambda q, *rest: queries.append(q.shape[2]) or wrapped(q, *rest)
    dense = run(tiny.pipe, tiny.call)
    assert torch.equal(dense, stock), "dense differs from stock"
    done = summary(tiny.pipe)
    remove(tiny.pipe)
    return Case(tiny, stock, done, queries[0])


@pytest.fixture(params=TINY)
def case(request):
    made = build(request.param)
    yield made
    remove(made.tiny.pipe)


def layers_of(pipe) -> list[torch.nn.Module]:
    models = [getattr(pipe, name, None) for name in DENOISERS]
    return [m for model in models if model for m in family_of(model).layers(model).values()]


def test_dense_is_bit_equal_and_every_call_has_its_step_branch_and_layer(case):
    entries, layers = case.dense.entries, case.dense.layers
    assert torch.equal(case.run(DENSE), case.stock)
    steps = case.tiny.call["num_inference_steps"]
    assert {entry.step for entry in entries} == set(range(steps))
    assert {entry.layer for entry in entries} == set(range(layers))
    places = [(e.expert, e.branch, e.step, e.layer) for e in entries]
    assert len(set(places)) == len(places)
    assert len(places) % (steps * layers) == 0  # every layer in every branch


def test_only_visual_self_attention_is_replaced_and_comes_back(case):
    pipe = case.tiny.pipe
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    modules = [m for part in parts for m in part.modules() if hasattr(m, "processor")]
    before = [module.processor for module in modules]
    apply(pipe, DENSE)
    ours = {id(m) for m in modules if isinstance(m.processor, SparseAttnProcessor)}
    assert ours == {id(layer) for layer in layers_of(pipe)}
    for module, former in zip(modules, before, strict=True):
        assert (id(module) in ours) or module.processor is former
    remove(pipe)
    assert all(m.processor is former for m, former in zip(modules, before, strict=True))


@pytest.mark.parametrize(("case", "name"), KEPT_RUNS, indirect=["case"])
def test_all_blocks_kept_equals_stock_at_odd_sizes_and_with_unequal_prompts(case, name, tmp_path):
    if name in case.tiny.refused:
        pytest.skip(f"{name} does not run on it: {case.tiny.refused[name]}")
    changes = {"radial": {}, "draft": case.tiny.odd, "paro": case.tiny.batch}[name]
    stock = case.run(**changes)
    case.run(DENSE, **changes)
    done = summary(case.tiny.pipe)
    method = method_for(name, done, case.heads, tmp_path, everything=True)
    out = case.run(method, **changes)
    torch.testing.assert_close(out, stock, atol=case.tiny.tolerance, rtol=0)
    assert summary(case.tiny.pipe).sparse_density == 1.0


@pytest.mark.parametrize(("case", "name"), METHOD_RUNS, indirect=["case"])
def test_every_method_runs_twice_the_same_or_says_why_not(case, name, tmp_path):
    method = method_for(name, case.dense, case.heads, tmp_path)
    if name in case.tiny.refused:
        with pytest.raises(ValueError, match=case.tiny.refused[name]):
            case.run(method)
        return
    first = case.run(method)
    assert torch.equal(case.run(method), first)
    assert first.isfinite().all() and not torch.equal(first, case.stock)
    done = summary(case.tiny.pipe)
    assert 0 < done.sparse_density < 1
    assert [(e.branch, e.step, e.layer) for e in done.entries] == [
        (e.branch, e.step, e.layer) for e in case.dense.entries
    ]


@pytest.mark.parametrize("case", OWN, indirect=True)
def test_saved_with_a_method_on_it_and_loaded_it_is_stock_again(case, tmp_path):
    apply(case.tiny.pipe, DENSE)
    case.tiny.pipe.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path, dtype=torch.float32, device="cpu")
    again.set_progress_bar_config(disable=True)
    assert type(again) is type(case.tiny.pipe)
    assert not any(isinstance(m.processor, SparseAttnProcessor) for m in layers_of(again))
    torch.testing.assert_close(run(again, dict(case.tiny.call)), case.stock, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", OWN, indirect=True)
@torch.no_grad()
def test_loaded_in_bf16_it_decodes(case, tmp_path):
    case.tiny.pipe.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path, dtype=torch.bfloat16, device="cpu")
    again.set_progress_bar_config(disable=True)
    # Small: bf16 convolutions take minutes on processors that have no instructions for them.
    small = {**case.tiny.call, **case.tiny.odd}
    call = {name: in_bf16(value) for name, value in small.items()}
    pictures = again(**{**call, "output_type": "np"})[0]
    assert np.isfinite(pictures).all() and np.ptp(pictures) > 0


def in_bf16(value):
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.bfloat16() if floating else value


def test_every_family_has_a_tiny_model_and_every_pipeline_a_class():
    built = [build(name).tiny.pipe for name in OWN]
    models = [getattr(pipe, name, None) for pipe in built for name in DENOISERS]
    assert {type(model).__name__ for model in models if model} >= FAMILIES.keys()
    for name, home in PIPELINES.items():
        assert issubclass(getattr(import_module(home), name), getattr(diffusers, name))
    assert set(OWN) | VARIANTS == set(TINY)


@pytest.mark.parametrize("home", sorted(set(FAMILIES.values())))
def test_families_do_not_import_each_other(home):
    tree = ast.parse(Path(import_module(home).__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & (set(FAMILIES.values()) - {home})
