"""Norm and RoPE in one pass: in sparse and in compiled calls only, with the same numbers, and only
where the norms' weights may be read past the norms."""

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch._dynamo.testing import CompileCounterWithBackend

from tests.methods.cases import CALIBRATED, call_at, ready
from tests.tiny_models import WAN_CALL, tiny_wan
from tests.tiny_models.catalogue import TINY
from vdit_sparse import METHODS, DraftAttention, apply, summary
from vdit_sparse.grid import Grid
from vdit_sparse.pipelines import hunyuan_video, one_pass, wan_attention

SPARSE = DraftAttention(block=64, density=0.5, dense_steps=1)
DENSE = DraftAttention(dense_steps=10)


@pytest.fixture
def anywhere(monkeypatch):
    """The one pass on every device, for weights that are there."""

    def why_not(x, weight, rotary):
        return None if (weight.dtype, weight.device) == (x.dtype, x.device) else "elsewhere"

    monkeypatch.setattr(one_pass, "why_not", why_not)


@pytest.fixture
def passes(monkeypatch):
    """One entry for each call of the one pass."""
    calls = []
    for module, name in ((wan_attention, "prepare_wan"), (hunyuan_video, "prepare_hunyuan")):
        real = getattr(module, name)

        def counted(*args, real=real, **options):
            calls.append(options)
            return real(*args, **options)

        monkeypatch.setattr(module, name, counted)
    return calls


@torch.no_grad()
def run(pipe, call):
    return pipe(**call, generator=torch.Generator().manual_seed(0))[0]


@pytest.mark.parametrize("entry", ["wan", "skyreels-v2", "hunyuan-video"])
def test_sparse_calls_take_one_pass_and_dense_ones_stay_stock(
    entry, device, monkeypatch, passes, request
):
    tiny = TINY[entry]()
    tiny.pipe.to(device)
    with monkeypatch.context() as patch:
        patch.setattr(one_pass, "why_not", lambda *_: "compared with")
        stock = run(tiny.pipe, tiny.call)
        apply(tiny.pipe, SPARSE)
        plain = run(tiny.pipe, tiny.call)
    assert not passes
    request.getfixturevalue("anywhere")
    torch.testing.assert_close(run(tiny.pipe, tiny.call), plain, atol=1e-4, rtol=0)
    done = summary(tiny.pipe)
    assert 0 < len(passes) == sum(not entry.dense for entry in done.entries) < done.calls
    passes.clear()
    apply(tiny.pipe, DENSE)
    assert torch.equal(run(tiny.pipe, tiny.call), stock) and not passes


def test_both_kinds_of_hunyuans_blocks_take_it(anywhere, passes):
    tiny = TINY["hunyuan-video"]()
    apply(tiny.pipe, SPARSE)
    run(tiny.pipe, tiny.call)
    assert {"text" in options for options in passes} == {True, False}


@pytest.mark.parametrize(
    "entry, kinds", [("wan", 1), ("skyreels-v2", 1), ("hunyuan-video", 2)], ids=str
)
def test_compiled_graphs_take_it_in_every_call(entry, kinds, anywhere):
    """One graph for each kind of block, which serves dense and sparse calls; HunyuanVideo's refiner
    of the text has others."""
    tiny = TINY[entry]()
    apply(tiny.pipe, SPARSE)
    eager = run(tiny.pipe, tiny.call)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    tiny.pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    torch.testing.assert_close(run(tiny.pipe, tiny.call), eager, atol=1e-4, rtol=0)
    passes = [str(graph.code).count("vdit_sparse.qk_prepare") for graph in counter.graphs]
    assert [count for count in passes if count] == [2] * kinds
    torch._dynamo.reset()


class Sparse:
    """A processor whose call is sparse."""

    def is_sparse(self):
        return True


def hooked(register):
    norm = torch.nn.RMSNorm(8, eps=1e-6)
    getattr(norm, register)(lambda *_: None)
    return norm


class Renamed(torch.nn.RMSNorm):
    """A norm that may do anything else."""


NORMS = {
    "forward hook": lambda: hooked("register_forward_hook"),
    "forward pre-hook": lambda: hooked("register_forward_pre_hook"),
    "offloaded by accelerate": lambda: accelerate.cpu_offload(
        torch.nn.RMSNorm(8, eps=1e-6), torch.device("cpu")
    ),
    "another class": lambda: Renamed(8, eps=1e-6),
    "no weight": lambda: torch.nn.RMSNorm(8, eps=1e-6, elementwise_affine=False),
    "eps of the dtype": lambda: torch.nn.RMSNorm(8),
    "another eps": lambda: torch.nn.RMSNorm(8, eps=1e-5),
    "weight elsewhere": lambda: torch.nn.RMSNorm(8, eps=1e-6, device="meta"),
    "weight in another dtype": lambda: torch.nn.RMSNorm(8, eps=1e-6, dtype=torch.float64),
    "none": lambda: None,
}


@pytest.mark.parametrize("case", NORMS)
def test_a_norm_with_anything_around_it_is_called_itself(case, anywhere):
    query, plain = torch.zeros(1, 4, 8), torch.nn.RMSNorm(8, eps=1e-6)
    with torch.no_grad():
        assert one_pass.is_one_pass(Sparse(), query, (plain, plain), torch.nn.RMSNorm, None)
        norms = plain, NORMS[case]()
        assert not one_pass.is_one_pass(Sparse(), query, norms, torch.nn.RMSNorm, None)
    norms = plain, plain
    assert not one_pass.is_one_pass(Sparse(), query, norms, torch.nn.RMSNorm, None)  # autograd


def cast_layerwise(transformer):
    casting = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    transformer.enable_layerwise_casting(**casting)


def offload_leaves(transformer):
    cpu = torch.device("cpu")
    apply_group_offloading(transformer, cpu, cpu, offload_type="leaf_level")


@pytest.mark.parametrize("move", [cast_layerwise, offload_leaves, accelerate.cpu_offload])
def test_weights_that_come_when_they_are_called_give_the_same(move, anywhere, monkeypatch):
    pipe = tiny_wan()
    move(pipe.transformer)
    apply(pipe, SPARSE)
    call = {**WAN_CALL, "num_inference_steps": 2}
    ours = run(pipe, call)
    monkeypatch.setattr(one_pass, "why_not", lambda *_: "compared with")
    torch.testing.assert_close(ours, run(pipe, call), atol=2e-5, rtol=0)


@pytest.mark.parametrize("grid", [Grid(4, 8, 16), Grid(5, 9, 14, 17)], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_the_way_back_to_the_models_order_needs_no_copy(name, grid, device):
    """So that `merge_heads` has nothing to save behind a method."""
    method = ready(name, **({} if name in CALIBRATED else {"block": 64}))
    qkv = torch.randn(3, 1, grid.tokens, 2, 16, device=device).transpose(2, 3)
    out = method(*qkv, call_at(name, grid, step=1))
    assert out.transpose(1, 2).is_contiguous()
