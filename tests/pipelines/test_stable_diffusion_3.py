"""Stable Diffusion 3 with what diffusers changes in its layers."""

import torch

from tests.tiny_models.catalogue import TINY
from vdit_sparse import DraftAttention, apply, remove, summary

DENSE = DraftAttention(dense_steps=10)


@torch.no_grad()
def run(pipe, call) -> torch.Tensor:
    return pipe(**call, generator=torch.Generator().manual_seed(0))[0]


def test_guidance_that_skips_layers_is_a_branch_of_its_own():
    tiny = TINY["stable-diffusion-3.5"]()
    skipping = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 1.0}
    call = {**tiny.call, **skipping, "skip_layer_guidance_start": -1.0}
    stock = run(tiny.pipe, call)
    apply(tiny.pipe, DENSE)
    assert torch.equal(run(tiny.pipe, call), stock)
    assert [(e.branch, e.step, e.layer) for e in summary(tiny.pipe).entries] == [
        (branch, step, layer)
        for step in (0, 1)
        for branch, layers in (("call 0", (0, 1, 2)), ("call 1", (0, 1)))
        for layer in layers
    ]


def test_fused_projections_give_the_same_and_their_processors_come_back():
    tiny = TINY["stable-diffusion-3"]()
    stock = run(tiny.pipe, tiny.call)
    tiny.pipe.transformer.fuse_qkv_projections()
    fused = tiny.pipe.transformer.attn_processors
    apply(tiny.pipe, DENSE)
    torch.testing.assert_close(run(tiny.pipe, tiny.call), stock, atol=1e-5, rtol=0)
    remove(tiny.pipe)
    assert tiny.pipe.transformer.attn_processors == fused
