"""LTX-2's perturbed layers, references and generated keyframes."""

import pytest
import torch
from diffusers.pipelines.ltx2.dfr_layout import LTX2DFREpilogueTile, epilogue_tiles

from tests.tiny_models.ltx2 import NEW, TINY, parts
from tests.tiny_models.parts import CALL
from vdit_sparse import (
    AdaSpaAttention,
    RadialAttention,
    RettentionAttention,
    apply,
    remove,
    summary,
)
from vdit_sparse.grid import Grid
from vdit_sparse.pipelines.ltx2 import LTX2DFRPipeline

DENSE = RadialAttention(dense_steps=10_000)
SPARSE = AdaSpaAttention(block=64, density=0.5, dense_steps=0)
# Beside each other, a column of tokens apart in size.
UNEQUAL = [
    LTX2DFREpilogueTile(slice(0, 4), slice(0, 8), slice(0, 9), torch.ones(4, 8, 9)),
    LTX2DFREpilogueTile(slice(0, 4), slice(0, 8), slice(9, 16), torch.ones(4, 8, 7)),
]


def run(pipe, call) -> torch.Tensor:
    return pipe(**call, generator=torch.Generator().manual_seed(0))[0]


def places(pipe) -> set:
    return {(entry.branch, entry.step, entry.layer) for entry in summary(pipe).entries}


def test_a_perturbed_layer_is_no_call_of_the_method():
    tiny = TINY["ltx2.3"]()
    call = {**tiny.call, "stg_scale": 1.0, "spatio_temporal_guidance_blocks": [1]}
    stock = run(tiny.pipe, call)
    apply(tiny.pipe, DENSE)
    assert torch.equal(run(tiny.pipe, call), stock)
    branches = {"cond_uncond": (0, 1), "uncond_stg": (0,), "uncond_modality": (0, 1)}
    assert places(tiny.pipe) == {
        (branch, step, layer)
        for branch, layers in branches.items()
        for step in (0, 1)
        for layer in layers
    }
    apply(tiny.pipe, SPARSE)
    assert run(tiny.pipe, call).isfinite().all() and summary(tiny.pipe).sparse_density < 1


@torch.no_grad()
def test_rows_can_be_perturbed_one_by_one():
    tiny = TINY["ltx2.3"]()
    model, seen = tiny.pipe.transformer, []
    watch = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    run(tiny.pipe, tiny.call)
    watch.remove()
    call = {**seen[0], "spatio_temporal_guidance_blocks": [1]}
    call["perturbation_mask"] = torch.tensor([0.0, 1.0])
    stock = model(**call)[0]
    apply(model, DENSE)
    assert torch.equal(model(**call)[0], stock)
    remove(model)
    assert not torch.equal(model(**seen[0])[0][0], stock[0])


@pytest.mark.parametrize(("name", "text"), [("ltx2-conditions", 128), ("ltx2-references", 64)])
def test_conditions_and_references_after_the_video_count_as_text(name, text):
    tiny = TINY[name]()
    apply(tiny.pipe, DENSE)
    run(tiny.pipe, tiny.call)
    assert summary(tiny.pipe).grid == Grid(4, 8, 16, text)


def test_attention_to_references_by_strength_is_refused():
    tiny = TINY["ltx2-references"]()
    apply(tiny.pipe, SPARSE)
    with pytest.raises(ValueError, match="leave conditioning_attention_strength at 1"):
        run(tiny.pipe, {**tiny.call, "conditioning_attention_strength": 0.5})


def with_keyframes() -> tuple[LTX2DFRPipeline, dict]:
    made = parts(use_keyframes_abs_pos_embedding=True, **NEW)
    made["transformer"].keyframes_abs_pos_embedding.data.normal_()
    pipe = LTX2DFRPipeline(**made)
    pipe.set_progress_bar_config(disable=True)
    call = {key: value for key, value in CALL.items() if key != "num_inference_steps"}
    call |= {"height": 64, "width": 128, "num_frames": 25, "max_sequence_length": 16}
    call |= {"sigmas": [1.0, 0.6, 0.3], "reference_latents": torch.ones(1, 4, 4, 4, 8)}
    return pipe, call


def test_tiles_of_unequal_size_are_calls_of_one_step():
    pipe, call = with_keyframes()
    call["video_tiles"] = UNEQUAL
    stock = run(pipe, call)
    apply(pipe, DENSE)
    assert torch.equal(run(pipe, call), stock)
    kept = RettentionAttention(block=64, dense_steps=1, density=0.03)
    for method in (kept, SPARSE):
        apply(pipe, method)
        assert run(pipe, call).isfinite().all()
        done = summary(pipe)
        # Re-ttention's band of whole blocks covers frames as small as these.
        assert done.steps == 3 and (done.sparse_density < 1 or method is kept)
        assert places(pipe) == {
            (f"call {tile}", step, layer)
            for tile in range(len(UNEQUAL))
            for step in range(3)
            for layer in (0, 1)
        }


@pytest.mark.parametrize("tiled", [False, True])
def test_generated_keyframes_and_a_half_size_reference(tiled):
    pipe, call = with_keyframes()
    if tiled:
        call["video_tiles"] = epilogue_tiles((4, 8, 16), 1, ())
    stock = run(pipe, call)
    apply(pipe, DENSE)
    assert torch.equal(run(pipe, call), stock)
    grid, done = summary(pipe).grid, places(pipe)
    assert (grid.frames, grid.height, grid.width) == ((4, 7, 14) if tiled else (4, 8, 16))
    if not tiled:
        assert grid.text == 128 + 4 * 4 * 8  # one keyframe, and the reference
    assert {place[1] for place in done} == {0, 1, 2}
    assert len(done) == 3 * 2 * (4 if tiled else 1)
    apply(pipe, SPARSE)
    assert run(pipe, call).isfinite().all() and summary(pipe).sparse_density < 1
