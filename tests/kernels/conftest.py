"""Lets Triton 3.6's interpreter run with NumPy 2.4, which no longer makes an integer of an array of
one element, as the interpreter does for the bounds of loops."""

import torch

if not torch.cuda.is_available():
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, *scope):
        patch_tensor(tensor, *scope)
        for each in scope:
            each.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_and_index
