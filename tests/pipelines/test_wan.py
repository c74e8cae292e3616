"""Wan 2.1 and 2.2: the same numbers as stock diffusers, in every way that people run it."""

import json

import diffusers
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch._dynamo.testing import CompileCounterWithBackend

from tests.tiny_models import WAN_CALL, tiny_wan
from vdit_sparse import METHODS, RadialAttention, apply, load_pipeline, remove, summary
from vdit_sparse.app.options import RUNNABLE
from vdit_sparse.call import Call
from vdit_sparse.grid import Grid
from vdit_sparse.pipelines.wan import PRESETS

DENSE = RadialAttention(block=64, dense_steps=10_000)
ALL_BLOCKS = RadialAttention(block=64, decay=1e9, decimate=False)
SPARSE = RadialAttention(block=64, dense_steps=1)


def run(pipe, call):
    return pipe(**call, generator=torch.Generator().manual_seed(0)).frames


def test_one_batch_row_does_not_depend_on_the_other():
    pipe = tiny_wan()
    apply(pipe, SPARSE)
    latents = torch.randn(2, 16, 5, 16, 16)
    both = pipe(**{**WAN_CALL, "prompt": ["a cat", "a dog"]}, latents=latents).frames
    for row, prompt in enumerate(("a cat", "a dog")):
        alone = pipe(**{**WAN_CALL, "prompt": prompt}, latents=latents[row : row + 1]).frames
        torch.testing.assert_close(both[row : row + 1], alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize("size", [(80, 112, 9), (16, 16, 1), (144, 96, 5)])
def test_odd_sizes(size):
    pipe = tiny_wan()
    call = {**WAN_CALL, **dict(zip(("height", "width", "num_frames"), size, strict=True))}
    stock = run(pipe, call)
    apply(pipe, ALL_BLOCKS)
    torch.testing.assert_close(run(pipe, call), stock, atol=2e-5, rtol=0)
    apply(pipe, SPARSE)
    assert run(pipe, call).isfinite().all()


def test_fused_projections():
    pipe = tiny_wan()
    stock = run(pipe, WAN_CALL)
    pipe.transformer.fuse_qkv_projections()
    apply(pipe, DENSE)
    torch.testing.assert_close(run(pipe, WAN_CALL), stock, atol=2e-5, rtol=0)


def test_regional_compilation_shares_one_graph_over_layers_and_steps():
    pipe = tiny_wan(layers=10, head_dim=24)
    apply(pipe, SPARSE)
    eager = run(pipe, WAN_CALL)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    torch.testing.assert_close(run(pipe, WAN_CALL), eager, atol=2e-5, rtol=0)
    assert counter.frame_count == 1
    apply(pipe, RadialAttention(block=64, dense_steps=2, decay=1.0))
    run(pipe, WAN_CALL)
    assert counter.frame_count == 1  # nor does another method need a new graph
    torch._dynamo.reset()


def test_whole_model_compilation_keeps_the_result():
    pipe = tiny_wan()
    apply(pipe, SPARSE)
    eager = run(pipe, WAN_CALL)
    torch._dynamo.reset()
    pipe.transformer.compile(backend="aot_eager")
    torch.testing.assert_close(run(pipe, WAN_CALL), eager, atol=2e-5, rtol=0)
    torch._dynamo.reset()


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offload(offload_type):
    pipe = tiny_wan()
    apply(pipe, SPARSE)
    plain = run(pipe, WAN_CALL)
    apply_group_offloading(
        pipe.transformer,
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type=offload_type,
        num_blocks_per_group=1,
    )
    assert torch.equal(run(pipe, WAN_CALL), plain)


def test_layerwise_casting():
    pipe = tiny_wan()
    casting = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    pipe.transformer.enable_layerwise_casting(**casting)
    stock = run(pipe, WAN_CALL)
    apply(pipe, DENSE)
    assert torch.equal(run(pipe, WAN_CALL), stock)
    apply(pipe, SPARSE)
    assert run(pipe, WAN_CALL).isfinite().all()


def test_a_first_block_cache_skips_blocks_without_losing_the_step():
    pipe = tiny_wan()
    apply(pipe, SPARSE)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=10.0))
    frames = run(pipe, WAN_CALL)
    steps = {entry.step for entry in summary(pipe).entries if entry.layer == 0}
    skipped = [entry for entry in summary(pipe).entries if entry.layer == 1 and entry.step > 0]
    assert frames.isfinite().all() and steps == {0, 1, 2} and not skipped


def test_load_pipeline_reads_folders_and_their_generation_defaults(tmp_path):
    tiny_wan().save_pretrained(tmp_path)
    own = {key: value for key, value in WAN_CALL.items() if key != "prompt"}
    (tmp_path / "generation.json").write_text(json.dumps({**own, "fps": 10}))
    pipe = load_pipeline(tmp_path, dtype=torch.float32, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    pipe.set_attn_processor(SPARSE)
    frames = pipe("a cat runs", generator=torch.Generator().manual_seed(0)).frames
    assert frames.shape == (1, 16, 5, 16, 16)
    remove(pipe)
    fewer = pipe("a cat runs", num_frames=9, generator=torch.Generator().manual_seed(0)).frames
    assert fewer.shape == (1, 16, 3, 16, 16)


def test_load_pipeline_refuses_what_it_cannot_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model_index\.json"):
        load_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "SanaPipeline"}')
    with pytest.raises(ValueError, match="SanaPipeline, which is not supported"):
        load_pipeline(tmp_path)


@pytest.mark.parametrize(
    ("name", "steps", "dense_steps", "dense_layers"),
    [
        ("radial-wan2.1", 50, 12, 1),
        ("radial-wan2.2", 40, 11, 1),
        ("sparse-vdit-wan2.1", 50, 10, 0),
        ("adaspa-wan2.1", 50, 10, 0),
        ("adaspa-wan2.1-flagscale", 50, 0, 0),
        ("draft-wan2.1", 50, 12, 1),
        ("paro-wan2.1", 30, 0, 0),
        *((f"{name}-mini", 16, 4, 0) for name in METHODS),
    ],
)
def test_presets_run_dense_where_their_sources_do(name, steps, dense_steps, dense_layers):
    calls = {
        (step, layer): Call(Grid(21, 45, 80), layer, 40, step, steps, memory={})
        for step in range(steps)
        for layer in range(40)
    }
    dense = {place for place, call in calls.items() if PRESETS[name].is_dense(call)}
    assert dense == {(i, j) for i, j in calls if i < dense_steps or j < dense_layers}


@pytest.mark.parametrize("steps", [4, 5, 8])
@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith("-mini-fast")])
def test_presets_for_few_steps_leave_sparse_ones_between_dense_ends(name, steps):
    """At the bundled model's size, whose attention has 3,136 tokens."""
    grid, memory, densities = Grid(7, 16, 28), {}, []
    q, k, v = torch.randn(3, 1, 2, grid.tokens, 16, generator=torch.Generator().manual_seed(0))
    for step in range(steps):
        call = Call(grid, 0, 10, step, steps, memory=memory)
        PRESETS[name](q, k, v, call)
        density = call.note.density
        densities.append(1.0 if density is None else float(density))
    assert densities[0] == densities[-1] == 1
    assert sum(density < 0.7 for density in densities) >= max(2, steps - 3)


def test_presets_have_the_name_of_their_method():
    for name, method in PRESETS.items():
        assert type(method) is RUNNABLE[name.rsplit("-wan" if "-wan" in name else "-mini", 1)[0]]


@pytest.mark.parametrize("name", ["adaspa-wan2.1-flagscale", "draft-wan2.1"])
def test_presets_that_start_sparse_leave_blocks_out(name):
    pipe = tiny_wan()
    pipe.set_attn_processor(name)
    assert run(pipe, {**WAN_CALL, "width": 256}).isfinite().all()
    assert 0 < summary(pipe).sparse_density < 1


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "gather"])
def test_compiled_sparse_blocks_on_a_gpu(backend):
    pipe = tiny_wan(layers=4, head_dim=64).to("cuda")
    stock = run(pipe, WAN_CALL)
    method = RadialAttention(block=64, decay=1e9, decimate=False, backend=backend)
    apply(pipe, method, timed=True)
    eager = run(pipe, WAN_CALL)
    # Dense fp32 attention may multiply in tf32, whatever the kernel does.
    torch.testing.assert_close(eager, stock, atol=5e-3, rtol=0)
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    torch.testing.assert_close(run(pipe, WAN_CALL), eager, atol=5e-3, rtol=0)
    assert summary(pipe).backend == backend and summary(pipe).milliseconds > 0
    torch._dynamo.reset()
