"""What the tests of several kernels need, and a repair of Triton's interpreter."""

import pytest
import torch


@pytest.fixture
def poisoned(monkeypatch):
    """Memory from `new_empty` holds NaN, so that an output which nobody writes is seen."""
    new_empty = torch.Tensor.new_empty

    def poison(*args, **kw):
        made = new_empty(*args, **kw)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poison)


# NumPy 2.4 no longer makes an integer of an array of one element, as Triton 3.6's interpreter does
# for the bounds of loops.
if not torch.cuda.is_available():
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, *scope):
        patch_tensor(tensor, *scope)
        for each in scope:
            each.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_and_index
