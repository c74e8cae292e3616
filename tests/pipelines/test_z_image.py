"""Z-Image's grid where no tiny pipeline goes."""

import pytest
import torch

from tests.tiny_models.z_image import text_to_image
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
