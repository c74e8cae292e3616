"""LTX-Video where tokens of conditions stand beside the video."""

import pytest
import torch
from diffusers import LTXEulerAncestralRFScheduler

from tests.tiny_models.ltx_video import RED, TINY, parts
from tests.tiny_models.parts import CALL
from vdit_sparse import AdaSpaAttention, RadialAttention, apply, remove, summary
from vdit_sparse.grid import Grid
from vdit_sparse.pipelines.ltx_video import LTXI2VLongMultiPromptPipeline
from vdit_sparse.pipelines.video_coords import find_video

DENSE = RadialAttention(dense_steps=10_000)


def run(pipe, call) -> torch.Tensor:
    return pipe(**call, generator=torch.Generator().manual_seed(0))[0]


def raster(times, height, width) -> torch.Tensor:
    axes = (torch.tensor(times), torch.arange(height), torch.arange(width))
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)


def test_conditions_before_the_video_count_as_text():
    tiny = TINY["ltx-video-conditions"]()
    apply(tiny.pipe, DENSE)
    run(tiny.pipe, tiny.call)
    assert summary(tiny.pipe).grid == Grid(4, 8, 16, text=2 * 128)


@pytest.mark.parametrize("height", [1, 3])
def test_a_video_is_found_among_other_tokens(height):
    video, early, late, small = (
        raster([0, 1, 9], height, 5),
        raster([8], height, 5),
        raster([9], height, 5),
        raster([0, 1, 9], 1, 2),
    )
    for before, after in ([], [late, early]), ([early, late], []), ([], [late, small]):
        grid, lead = find_video(torch.cat([*before, video, *after], dim=1))
        tokens = sum(x.shape[1] for x in before)
        text = tokens + sum(x.shape[1] for x in after)
        assert (grid, lead) == (Grid(3, height, 5, text), tokens)
    twice = torch.cat([video, video], dim=1)
    assert find_video(twice) == (Grid(3, height, 5, 15 * height), 0)


def test_a_keyframe_behind_the_video_is_no_frame_of_it():
    coords = torch.cat([raster([0, 1, 9], 2, 5), raster([16], 2, 5)], dim=1)
    ends = torch.tensor([1, 9, 17, 17]).repeat_interleave(10)
    assert find_video(coords, ends) == (Grid(3, 2, 5, 10), 0)
    assert find_video(coords) == (Grid(4, 2, 5, 0), 0)


def test_tokens_without_equal_rows_are_no_video():
    part = raster([0], 2, 5)[:, :-1]
    with pytest.raises(ValueError, match="a video among 9 tokens: frames of equal rows"):
        find_video(part)
    assert find_video(torch.cat([part, raster([0, 1], 2, 5)], dim=1)) == (Grid(2, 2, 5, 9), 9)


def test_long_videos_of_several_prompts():
    pipe = LTXI2VLongMultiPromptPipeline(**{**parts(), "scheduler": LTXEulerAncestralRFScheduler()})
    pipe.set_progress_bar_config(disable=True)
    call = {**CALL, "prompt": "a cat | a dog", "height": 64, "width": 128, "num_frames": 41}
    call |= {"cond_image": RED, "temporal_tile_size": 32, "temporal_overlap": 16}
    call |= {"num_inference_steps": 3, "max_sequence_length": 16}
    stock = run(pipe, call)
    apply(pipe, DENSE)
    assert torch.equal(run(pipe, call), stock)
    # The second window of four frames has the last two of the first and the image behind it. It
    # makes one step less than it is asked for.
    assert summary(pipe).grid == Grid(4, 8, 16, text=3 * 128)
    assert [(e.step, e.layer) for e in summary(pipe).entries] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    ends = {"dense_steps": 0, "dense_search": False, "last_dense_steps": 1}
    apply(pipe, AdaSpaAttention(block=64, density=0.5, **ends))
    assert run(pipe, call).isfinite().all()
    done = summary(pipe)
    assert done.sparse_density < 1 and done.steps == 2
    assert {entry.step for entry in done.entries if entry.dense} == {1}
    remove(pipe)
    assert torch.equal(run(pipe, call), stock)


def test_fused_projections():
    tiny = TINY["ltx-video"]()
    tiny.pipe.transformer.fuse_qkv_projections()
    stock = run(tiny.pipe, tiny.call)
    apply(tiny.pipe, DENSE)
    assert torch.equal(run(tiny.pipe, tiny.call), stock)
