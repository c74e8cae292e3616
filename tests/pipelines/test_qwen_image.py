"""Qwen-Image where no tiny pipeline goes: layers and several references."""

import pytest
import torch

from tests.tiny_models.qwen_image import qwen_image_transformer
from vdit_sparse import DraftAttention, RadialAttention, apply, remove, summary
from vdit_sparse.grid import Grid
from vdit_sparse.pipelines.families import family_of

LAYERED = {"use_layer3d_rope": True, "use_additional_t_cond": True}


def arguments(sizes: list[tuple[int, int, int]]) -> dict:
    seeded = torch.Generator().manual_seed(0)
    tokens = sum(frames * height * width for frames, height, width in sizes)
    return {
        "hidden_states": torch.randn(2, tokens, 16, generator=seeded),
        "encoder_hidden_states": torch.randn(2, 20, 16, generator=seeded),
        "encoder_hidden_states_mask": torch.arange(20) < torch.tensor([[20], [9]]),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_shapes": [sizes, sizes],
        "return_dict": False,
    }


@pytest.mark.parametrize(
    ("config", "sizes", "grid"),
    [
        # Two references of other sizes.
        ({}, [(1, 16, 24), (1, 16, 16), (1, 5, 7)], Grid(1, 16, 24, 20 + 256 + 35)),
        # Three layers and the image that they make, then the reference.
        (LAYERED, [(1, 10, 10)] * 5, Grid(4, 10, 10, 20 + 100)),
    ],
)
@torch.no_grad()
def test_references_are_text_and_layers_are_frames(config, sizes, grid):
    transformer = qwen_image_transformer(**config)
    given = arguments(sizes)
    if config:
        given["additional_t_cond"] = torch.zeros(2, dtype=torch.long)
    assert family_of(transformer).grid(transformer, given) == grid
    stock = transformer(**given)[0]
    apply(transformer, DraftAttention(dense_steps=10))
    assert torch.equal(transformer(**given)[0], stock)
    sparse = {"dense_steps": 0, "block": 64}
    apply(transformer, DraftAttention(density=1.0, **sparse))
    torch.testing.assert_close(transformer(**given)[0], stock, atol=2e-5, rtol=0)
    apply(transformer, DraftAttention(density=0.5, **sparse))
    assert not torch.equal(transformer(**given)[0], stock)
    assert 0 < summary(transformer).sparse_density < 1
    remove(transformer)


def test_layers_are_no_frames_in_time():
    with pytest.raises(ValueError, match="distance of frames in time"):
        apply(qwen_image_transformer(**LAYERED), RadialAttention())
