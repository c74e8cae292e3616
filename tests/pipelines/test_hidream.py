"""HiDream: the padding of images that are not square."""

import pytest
import torch

from tests.tiny_models.hidream import text_to_image
from vdit_sparse import AdaSpaAttention, apply, summary

DENSE = AdaSpaAttention(dense_steps=10_000)


@torch.no_grad()
def test_padding_counts_as_text():
    tiny = text_to_image()
    apply(tiny.pipe, DENSE)
    tiny.pipe(**tiny.call)
    square = summary(tiny.pipe).grid
    assert (square.frames, square.height, square.width, square.text) == (1, 16, 16, 3 * 16)
    tiny.pipe(**{**tiny.call, **tiny.odd})
    wide = summary(tiny.pipe).grid
    assert (wide.height, wide.width, wide.text) == (12, 21, 3 * 16 + 256 - 12 * 21)


def test_latents_that_come_in_patches_are_refused():
    tiny = text_to_image()
    apply(tiny.pipe, DENSE)
    with pytest.raises(ValueError, match=r"Expected latents \[B, C, H, W\]"):
        tiny.pipe.transformer(hidden_states=torch.zeros(1, 256, 256))
