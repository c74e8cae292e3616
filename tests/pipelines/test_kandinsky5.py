"""Kandinsky 5: checkpoints with sparse attention of their own."""

import pytest

from tests.tiny_models.kandinsky5 import text_to_video
from vdit_sparse import DraftAttention, apply
from vdit_sparse.pipelines.processor import SparseAttnProcessor


def test_nabla_is_turned_off_as_the_refusal_says():
    pipe = text_to_video().pipe
    pipe.transformer.register_to_config(attention_type="nabla")
    with pytest.raises(ValueError, match=r'register_to_config\(attention_type="regular"\)'):
        apply(pipe, DraftAttention())
    pipe.transformer.register_to_config(attention_type="regular")
    apply(pipe, DraftAttention())
    block = pipe.transformer.visual_transformer_blocks[0]
    assert isinstance(block.self_attention.processor, SparseAttnProcessor)
