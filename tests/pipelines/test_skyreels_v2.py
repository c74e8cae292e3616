"""SkyReels-V2's diffusion forcing, where every frame has a timestep of its own."""

import pytest
import torch

from tests.tiny_models.skyreels_v2 import TINY
from vdit_sparse import AdaSpaAttention, RadialAttention, apply, remove, summary

SPARSE = AdaSpaAttention(block=64, density=0.5, dense_steps=0)


@pytest.fixture
def pipe_and_call():
    tiny = TINY["skyreels-v2-forcing"]()
    return tiny.pipe, dict(tiny.call)


def run(pipe, call) -> torch.Tensor:
    return pipe(**call, generator=torch.Generator().manual_seed(0))[0]


def test_frames_that_lag_behind_make_more_steps(pipe_and_call):
    pipe, call = pipe_and_call
    call |= {"ar_step": 1}  # four frames, each one step behind the frame before it
    stock = run(pipe, call)
    apply(pipe, RadialAttention(dense_steps=10_000))
    assert torch.equal(run(pipe, call), stock)
    assert {entry.step for entry in summary(pipe).entries} == set(range(2 + 3))
    ends = AdaSpaAttention(block=64, density=0.5, dense_steps=0.4, last_dense_steps=1)
    apply(pipe, ends)
    assert run(pipe, call).isfinite().all()
    done = summary(pipe)
    assert done.sparse_density < 1 and done.steps == 5
    assert {entry.step for entry in done.entries if entry.dense} == {0, 1, 4}


def test_every_part_of_a_long_video_is_a_run_of_its_own(pipe_and_call):
    pipe, call = pipe_and_call
    # Four latent frames, then four of which two are the last ones of before.
    call |= {"num_frames": 21, "base_num_frames": 13, "overlap_history": 5}
    call |= {"addnoise_condition": 20}
    apply(pipe, SPARSE)
    assert run(pipe, call).shape[2] == 6
    done = summary(pipe)
    assert [(e.branch, e.step, e.layer) for e in done.entries] == [
        (branch, step, layer)
        for step in (0, 1)
        for branch in ("cond", "uncond")
        for layer in (0, 1)
    ]


def test_causal_blocks_of_frames_are_refused_before_and_after_apply(pipe_and_call):
    pipe, call = pipe_and_call
    apply(pipe, SPARSE)
    with pytest.raises(ValueError, match="causal over blocks of frames"):
        run(pipe, {**call, "causal_block_size": 2, "ar_step": 1})
    remove(pipe)
    with pytest.raises(ValueError, match="causal over blocks of frames"):
        apply(pipe, SPARSE)


def test_fused_projections(pipe_and_call):
    pipe, call = pipe_and_call
    pipe.transformer.fuse_qkv_projections()
    stock = run(pipe, call)
    apply(pipe, RadialAttention(dense_steps=10_000))
    assert torch.equal(run(pipe, call), stock)
