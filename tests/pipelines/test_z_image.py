"""Z-Image where no tiny pipeline goes: its grid, and guidance that ends before the run."""

import pytest
import torch

from tests.tiny_models.z_image import text_to_image
from vdit_sparse import AdaSpaAttention, DraftAttention, RettentionAttention, apply, summary
from vdit_sparse.grid import Grid
from vdit_sparse.pipelines.z_image import FAMILY


def grid(sizes: list[tuple[int, int]], prompts: list[int]) -> Grid:
    arguments = {
        "x": [torch.zeros(16, 1, *size) for size in sizes],
        "cap_feats": [torch.zeros(length, 16) for length in prompts],
    }
    return FAMILY.grid(text_to_image().pipe.transformer, arguments)


def test_text_counts_what_fills_up_the_image_and_the_prompts():
    assert grid([(26, 34)] * 2, [32, 33]) == Grid(1, 13, 17, 3 + 64)
    assert grid([(32, 48)], [1]) == Grid(1, 16, 24, 32)


def test_images_of_several_sizes_or_with_references_are_refused():
    with pytest.raises(ValueError, match="one size"):
        grid([(32, 48), (32, 32)], [5, 5])
    with pytest.raises(ValueError, match="no reference images"):
        FAMILY.grid(text_to_image().pipe.transformer, {"x": [[None]], "cap_feats": [[]]})


@pytest.mark.parametrize("method", [DraftAttention, AdaSpaAttention, RettentionAttention])
@torch.no_grad()
def test_guidance_in_the_batch_may_end_before_the_run(method):
    tiny = text_to_image()
    # The batch has two rows at first, then one.
    call = {**tiny.call, "num_inference_steps": 4, "cfg_truncation": 0.3}
    rows = []
    forward = tiny.pipe.transformer.forward
    tiny.pipe.transformer.forward = lambda x, *rest, **more: (
        rows.append(len(x)) or forward(x, *rest, **more)
    )
    apply(tiny.pipe, method(dense_steps=0, block=64, refresh="once"))
    images = tiny.pipe(**call, generator=torch.Generator().manual_seed(0))[0]
    assert sorted(set(rows)) == [1, 2] and images.isfinite().all()
    assert {entry.step for entry in summary(tiny.pipe).entries} == {0, 1, 2, 3}
