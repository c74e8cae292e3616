"""Our hook beneath accelerate's, which model and sequential offload set and take off again."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module


@contextmanager
def beneath_offload(model: torch.nn.Module) -> Iterator[None]:
    """Takes accelerate's hook off the model's root for as long, and sets it again.

    Both libraries replace the model's forward and put back what they found: a hook that was
    registered over accelerate's would be gone when diffusers sets that anew after every run, and
    one that is removed beneath it would take it along.
    """
    hook = getattr(model, "_hf_hook", None)
    if hook is None:
        yield
        return
    remove_hook_from_module(model)
    try:
        yield
    finally:
        add_hook_to_module(model, hook)
