"""HunyuanVideo 1.5: no mask of S x S is made, which would take 12 GB at published sizes."""

import torch

from tests.tiny_models.hunyuan_video15 import text_to_video
from vdit_sparse import AdaSpaAttention, apply
from vdit_sparse.pipelines import processor


@torch.no_grad()
def test_dense_steps_mask_keys_only(monkeypatch):
    masks, dispatch = [], processor.dispatch_attention_fn

    def recording(query, key, value, *, attn_mask, **options):
        masks.append(attn_mask)
        return dispatch(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(processor, "dispatch_attention_fn", recording)
    tiny = text_to_video()
    apply(tiny.pipe, AdaSpaAttention(dense_steps=10_000))
    tiny.pipe(**tiny.call)
    video, image, glyphs, prompt = 4 * 8 * 16, 9, 16, 24
    assert len(masks) == 8  # 2 steps, 2 branches, 2 layers
    assert all(mask.shape == (1, 1, 1, video + image + glyphs + prompt) for mask in masks)
    assert {int(mask.sum()) for mask in masks} == {video + 11, video + 5}
