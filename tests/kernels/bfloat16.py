"""Rounding to bf16 in Triton's interpreter, which cuts the digits off instead."""

import numpy as np
import pytest
import torch


@pytest.fixture
def bfloat16(monkeypatch):
    """fp32 is rounded to bf16 by torch where kernels are interpreted."""
    if torch.cuda.is_available():
        return
    import triton.language as tl
    from triton.runtime import interpreter

    cuts = interpreter._convert_float

    def convert(data, source, target, rounding):
        if (source, target) == (tl.float32, tl.bfloat16):
            exact = torch.from_numpy(np.ascontiguousarray(data)).bfloat16()
            return exact.view(torch.uint16).numpy()
        return cuts(data, source, target, rounding)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
