"""Chroma's mask, which is added to the scores."""

import pytest
import torch
from torch import Tensor

from vdit_sparse.pipelines.chroma import ChromaSparseAttnProcessor


def parts() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, value of 5 text and 7 image tokens, and the mask of 3 and 5 real text tokens."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 12, 2, 16, dtype=torch.float64)
    real = torch.ones(2, 12, dtype=torch.float64)
    real[0, 3:5] = 0
    return query, key, value, real[:, None, None, :] * real[:, None, :, None]


def weights(query: Tensor, key: Tensor, mask: Tensor | float = 0.0) -> Tensor:
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * query.shape[-1] ** -0.5
    return (scores + mask).softmax(-1)


def test_more_channels_say_what_the_mask_adds():
    query, key, value, mask = parts()
    wide = ChromaSparseAttnProcessor(0, 0).sparse(query, key, value, mask)
    expected = weights(query, key, mask)
    torch.testing.assert_close(weights(*wide[:2]), expected)
    assert (weights(query, key) - expected).abs().max() > 0.01  # the mask is no small thing
    assert torch.equal(wide[2][..., :16], value) and not wide[2][..., 16:].any()


def test_without_a_mask_nothing_is_added_and_a_bool_mask_is_refused():
    query, key, value, mask = parts()
    processor = ChromaSparseAttnProcessor(0, 0)
    assert processor.sparse(query, key, value, None) == (query, key, value)
    assert processor.keys(mask, query) is None
    with pytest.raises(ValueError, match="takes the float mask"):
        processor.keys(mask.bool(), query)
