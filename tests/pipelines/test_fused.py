"""PixArt and HunyuanDiT, whose fused projections bring processors of their own."""

import pytest
import torch

from tests.tiny_models.catalogue import TINY
from vdit_sparse import DraftAttention, apply, remove

DENSE = DraftAttention(dense_steps=10)


@torch.no_grad()
@pytest.mark.parametrize("name", ["pixart-sigma", "hunyuan-dit"])
def test_fused_projections_give_the_same_and_their_processors_come_back(name):
    tiny = TINY[name]()
    tiny.pipe.transformer.fuse_qkv_projections()
    fused = tiny.pipe.transformer.attn_processors
    stock, ours = (run(tiny, method) for method in (None, DENSE))
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=0)
    remove(tiny.pipe)
    assert tiny.pipe.transformer.attn_processors == fused


def run(tiny, method) -> torch.Tensor:
    if method is not None:
        apply(tiny.pipe, method)
    return tiny.pipe(**tiny.call, generator=torch.Generator().manual_seed(0))[0]
