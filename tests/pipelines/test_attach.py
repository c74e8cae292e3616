"""apply, remove, summary: who is touched, when a run begins, and whose state is whose."""

from dataclasses import dataclass, field

import pytest
import torch
from diffusers.hooks import LayerSkipConfig
from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
from diffusers.hooks.layer_skip import apply_layer_skip
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from tests.tiny_models import WAN_CALL, tiny_wan, tiny_wan_i2v, wan_i2v_call, wan_transformer
from vdit_sparse import (
    BlockMask,
    Grid,
    PAROAttention,
    Plan,
    RadialAttention,
    SparseAttention,
    apply,
    load_pipeline,
    remove,
    summary,
)
from vdit_sparse.calibration import CalibrationWarning
from vdit_sparse.pipelines.processor import SparseAttnProcessor, skipped

SPARSE = RadialAttention(block=64)


@dataclass(frozen=True, kw_only=True)
class Probe(SparseAttention):
    """Keeps every block and writes down every call."""

    block: int = 64
    calls: list = field(default_factory=list, compare=False)

    def plan(self, q, k, call):
        call.memory["visits"] = call.memory.get("visits", 0) + 1
        self.calls.append((call, call.memory["visits"]))
        blocks = -(-call.grid.tokens // self.block)
        return Plan(BlockMask.from_keep(torch.ones(blocks, blocks, dtype=torch.bool), self.block))


class Stop(Exception):
    pass


def frames(pipe, **changes):
    call = wan_i2v_call() if "Image" in type(pipe).__name__ else WAN_CALL
    generator = torch.Generator().manual_seed(0)
    return pipe(**{**call, **changes}, generator=generator).frames


def test_only_self_attention_is_replaced_and_remove_gives_all_of_it_back():
    pipe = tiny_wan()
    before = dict(pipe.transformer.attn_processors)
    apply(pipe, SPARSE)
    during = pipe.transformer.attn_processors
    for name, processor in before.items():
        assert isinstance(during[name], SparseAttnProcessor) == ("attn1" in name)
        assert ("attn2" in name) == (during[name] is processor)
    remove(pipe)
    after = pipe.transformer.attn_processors
    assert all(after[name] is processor for name, processor in before.items())


def test_remove_restores_the_output_bit_for_bit_and_twice_is_harmless():
    pipe = tiny_wan()
    stock = frames(pipe)
    apply(pipe, SPARSE)
    assert not torch.equal(frames(pipe), stock)
    remove(pipe)
    remove(pipe)
    assert torch.equal(frames(pipe), stock)


def test_every_call_knows_step_steps_layer_and_grid():
    pipe, probe = tiny_wan(), Probe()
    apply(pipe, probe)
    frames(pipe)
    calls = [call for call, _ in probe.calls]
    assert {call.grid for call in calls} == {Grid(5, 8, 8)}
    assert {(call.layers, call.steps) for call in calls} == {(2, 3)}
    assert [call.step for call in calls] == [0] * 4 + [1] * 4 + [2] * 4
    assert [call.layer for call in calls] == [0, 1] * 6


@pytest.mark.parametrize("build", [tiny_wan, tiny_wan_i2v])
def test_memory_is_kept_by_layer_and_branch_and_emptied_between_runs(build):
    pipe, probe = build(), Probe()
    apply(pipe, probe)
    frames(pipe)
    visits = [count for _, count in probe.calls]
    assert visits == [1] * 4 + [2] * 4 + [3] * 4
    memories = {id(call.memory): call.layer for call, _ in probe.calls}
    assert sorted(memories.values()) == [0, 0, 1, 1]
    frames(pipe)
    assert [count for _, count in probe.calls[12:]] == visits


def test_both_experts_share_the_steps_but_not_the_memory():
    pipe, probe = tiny_wan(experts=2), Probe()
    apply(pipe, probe)
    frames(pipe)
    assert [call.step for call, _ in probe.calls] == [0] * 4 + [1] * 4 + [2] * 4
    counts = [count for _, count in probe.calls]
    assert counts == [1] * 4 + [2] * 4 + [1] * 4  # the last step is the second expert's first
    experts = [entry.expert for entry in summary(pipe).entries]
    assert experts == ["transformer"] * 8 + ["transformer_2"] * 4


@pytest.mark.parametrize("build", [tiny_wan, tiny_wan_i2v])
@pytest.mark.parametrize("last_step", [0, 1])
def test_an_exception_in_the_middle_of_a_run_leaves_nothing_behind(build, last_step):
    pipe = build()
    apply(pipe, RadialAttention(block=64, refresh="once", dense_steps=1))
    wanted = frames(pipe)

    def stop(pipe, step, timestep, kwargs):
        if step == last_step:
            raise Stop
        return kwargs

    with pytest.raises(Stop):
        frames(pipe, callback_on_step_end=stop)
    assert torch.equal(frames(pipe), wanted)
    assert [entry.step for entry in summary(pipe).entries] == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize("build", [tiny_wan, tiny_wan_i2v])
def test_an_exception_inside_the_model_begins_a_new_run(build):
    pipe, probe = build(), Probe()
    apply(pipe, probe)
    fail = pipe.transformer.blocks[1].register_forward_pre_hook(raise_stop)
    with pytest.raises(Stop):
        frames(pipe)
    fail.remove()
    del probe.calls[:]
    frames(pipe)
    assert [count for _, count in probe.calls] == [1] * 4 + [2] * 4 + [3] * 4


def raise_stop(module, args):
    raise Stop


def test_two_pipelines_in_one_process_do_not_mix():
    one, two = tiny_wan(), tiny_wan()
    alone = [frames(tiny(method)) for method in (SPARSE, Probe())]
    apply(one, SPARSE)
    apply(two, Probe())

    def interleave(pipe, step, timestep, kwargs):
        if step == 1:
            assert torch.equal(frames(two), alone[1])
        return kwargs

    assert torch.equal(frames(one, callback_on_step_end=interleave), alone[0])


def tiny(method):
    pipe = tiny_wan()
    apply(pipe, method)
    return pipe


def test_another_size_begins_a_new_run():
    pipe, probe = tiny_wan(), Probe()
    apply(pipe, probe)
    frames(pipe)
    frames(pipe, height=64, num_frames=9)
    assert {call.grid for call, _ in probe.calls[12:]} == {Grid(3, 4, 8)}
    assert probe.calls[12][1] == 1


def test_summary_counts_dense_and_sparse_calls():
    pipe = tiny_wan()
    apply(pipe, RadialAttention(block=64, dense_steps=1, dense_layers=1), timed=True)
    assert "no run yet" in str(summary(pipe))
    frames(pipe)
    result = summary(pipe)
    sparse = [entry for entry in result.entries if not entry.dense]
    assert result.calls == 12 and len(sparse) == 4
    assert all(entry.step > 0 and entry.layer == 1 for entry in sparse)
    assert result.density == pytest.approx((8 + 4 * result.sparse_density) / 12)
    assert 0.3 < result.sparse_density < 0.9
    assert all(entry.milliseconds > 0 for entry in result.entries)
    assert result.backend in ("gather", "triton") and "reference" in result.reasons
    assert "RadialAttention" in str(result) and f"{result.density:.3f}" in str(result)


def test_the_last_dense_steps_are_counted_from_the_pipelines_number_of_steps():
    pipe = tiny_wan_i2v()
    apply(pipe, RadialAttention(block=64, last_dense_steps=1))
    frames(pipe)
    dense = {entry.step: entry.dense for entry in summary(pipe).entries}
    assert dense == {0: False, 1: False, 2: True}


def forward(transformer, timestep=900.0):
    latents = torch.randn(1, 16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    text = torch.ones(1, 4, 32)
    return transformer(latents, torch.tensor([timestep]), text, return_dict=False)[0]


@torch.no_grad()
def test_a_bare_transformer_counts_steps_by_the_timestep():
    transformer, probe = wan_transformer(1, 16), Probe()
    apply(transformer, probe)
    for timestep in (900.0, 900.0, 500.0, 500.0, 900.0):
        forward(transformer, timestep)
    assert [call.step for call, _ in probe.calls] == [0, 0, 1, 1, 0]
    assert [count for _, count in probe.calls] == [1, 1, 2, 2, 1]  # two branches, then a new run
    assert {call.steps for call, _ in probe.calls} == {None}


@torch.no_grad()
def test_a_bare_transformer_says_that_it_does_not_know_the_number_of_steps():
    transformer = wan_transformer(1, 16)
    apply(transformer, RadialAttention(block=64, last_dense_steps=1))
    with pytest.raises(ValueError, match="number of denoising steps"):
        forward(transformer)


def test_a_call_under_autograd_raises():
    transformer = wan_transformer(1, 16)
    apply(transformer, SPARSE)
    with pytest.raises(RuntimeError, match="inference only"):
        forward(transformer)


def test_set_attn_processor_takes_methods_presets_and_ordinary_processors():
    pipe = tiny_wan()
    cross = pipe.transformer.blocks[0].attn2.processor
    pipe.set_attn_processor(SPARSE)
    assert "RadialAttention" in summary(pipe).method
    pipe.set_attn_processor("radial-wan2.2")
    assert "decay=0.8" in summary(pipe).method
    ordinary = WanAttnProcessor()
    pipe.set_attn_processor(ordinary)
    assert pipe.transformer.blocks[0].attn1.processor is ordinary
    assert pipe.transformer.blocks[0].attn2.processor is cross
    assert summary(pipe).method.startswith("none")


def test_the_chosen_dense_backend_is_kept_both_ways():
    pipe = tiny_wan()
    attention = pipe.transformer.blocks[0].attn1
    attention.processor._attention_backend = "native"
    apply(pipe, SPARSE)
    assert attention.processor._attention_backend == "native"
    attention.processor._attention_backend = "_native_math"
    remove(pipe)
    assert attention.processor._attention_backend == "_native_math"


@pytest.mark.parametrize(
    ("target", "method", "error", "words"),
    [
        (torch.nn.Linear(1, 1), SPARSE, ValueError, "No sparse attention for Linear"),
        ("a string", SPARSE, TypeError, "pipeline or transformer"),
        (None, "radial-wan3", ValueError, "radial-wan2.1"),
        (None, 7, TypeError, "method or a preset"),
    ],
)
def test_errors_say_what_was_expected(target, method, error, words):
    target = wan_transformer(1, 16) if target is None else target
    with pytest.raises(error, match=words):
        apply(target, method)


def test_summary_names_the_calibration_that_came_with_the_checkpoint():
    pipe = load_pipeline()
    apply(pipe, PAROAttention())
    call = {"prompt": "", "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    with pytest.warns(CalibrationWarning, match="number of steps of the file 16, of this run 1"):
        pipe(**call)
    done = summary(pipe)
    assert done.calibration.endswith("calibrations/paro-25-frames.safetensors")
    assert f"calibration: {done.calibration}" in str(done)
    assert done.density == pytest.approx(0.35, abs=0.1)
    with pytest.raises(ValueError, match=r"no calibration of PAROAttention for the token grid \[2"):
        pipe(**call, num_frames=5)


def test_layers_that_lost_their_processor_say_so_and_another_apply_helps():
    pipe = tiny_wan()
    apply(pipe, SPARSE)
    wanted = frames(pipe)
    pipe.transformer.blocks[1].attn1.set_processor(WanAttnProcessor())
    with pytest.raises(RuntimeError, match=r"1 of 2 layers .* blocks\.1\.attn1 has a WanAttn"):
        frames(pipe)
    apply(pipe, SPARSE)
    assert torch.equal(frames(pipe), wanted)


def test_a_processor_that_is_not_stock_is_not_thrown_away():
    class Adapter(WanAttnProcessor):
        pass

    pipe = tiny_wan(experts=2)
    pipe.transformer_2.blocks[1].attn1.set_processor(Adapter())
    with pytest.raises(ValueError, match=r"blocks\.1\.attn1 has a Adapter.*Unload"):
        apply(pipe, SPARSE)
    assert isinstance(pipe.transformer.blocks[0].attn1.processor, WanAttnProcessor)


@pytest.mark.parametrize("what", ["skip_attention", "skip_attention_scores"])
def test_guiders_skip_our_layers_as_they_skip_stock_ones(what, monkeypatch):
    metadata = AttentionProcessorMetadata(skipped)
    monkeypatch.setitem(AttentionProcessorRegistry._registry, WanAttnProcessor, metadata)
    choice = {"skip_attention": False, "skip_ff": False, "skip_attention_scores": False, what: True}
    config = LayerSkipConfig(indices=[0, 1], fqn="blocks", **choice)
    outputs = []
    for method in (None, SPARSE):
        pipe = tiny_wan()
        if method:
            apply(pipe, method)
        apply_layer_skip(pipe.transformer, config)
        outputs.append(frames(pipe))
    assert torch.equal(*outputs)


def test_nothing_is_remembered_after_a_run_that_failed():
    pipe, probe = tiny_wan(), Probe()
    apply(pipe, probe)
    with pytest.raises(Stop):
        frames(pipe, callback_on_step_end=raise_stop_at_step)
    run = pipe.transformer._diffusers_hook.get_hook("vdit_sparse")
    assert probe.calls and not run._memory


def raise_stop_at_step(pipe, step, timestep, kwargs):
    raise Stop
