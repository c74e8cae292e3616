"""fp8 e4m3 in Triton's interpreter, whose own conversion loses carries and rounds ties up."""

import numpy as np
import pytest
import torch


@pytest.fixture
def float8(monkeypatch):
    """Conversions to and from e4m3 by torch where kernels are interpreted."""
    if torch.cuda.is_available():
        return
    from triton.language import float8e4nv
    from triton.runtime import interpreter

    wrong = interpreter._convert_float

    def convert(data, source, target, rounding):
        if target == float8e4nv:
            exact = torch.from_numpy(np.ascontiguousarray(data)).float().clamp(-448, 448)
            return exact.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return wrong(data, source, target, rounding)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
