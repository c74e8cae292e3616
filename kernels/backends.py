"""The choice of a backend, the same in every package of kernels.

A package's `BACKENDS` names its modules in the order of preference: "triton" for GPUs, then the one
for every device, then those that are never chosen unasked. Each module has `supports(*call)`, which
gives None if it computes the call, else the reason why not.
"""

from importlib import import_module
from types import ModuleType

from torch import Tensor


def choose(backends: dict[str, str], backend: str | None, x: Tensor, *call) -> ModuleType:
    """The module that computes this call, `x` and what else its `supports` is asked about: the one
    named `backend`, else the default. Raises ValueError for an unknown name and for a backend that
    does not take the call."""
    check_name(backends, backend)
    return load(backends, backend or default(backends, x, *call), x, *call)


def check_name(backends: dict[str, str], backend: str | None) -> None:
    """Raises ValueError unless `backend` is a name in `backends` or None."""
    if backend is not None and backend not in backends:
        raise ValueError(f"backend must be one of {tuple(backends)} or None, got {backend!r}.")


def default(backends: dict[str, str], x: Tensor, *call) -> str:
    """Triton on a GPU where it takes the call, else the backend for every device."""
    triton, portable, *_ = backends
    on_gpu = x.device.type == "cuda" and why_not(backends, triton, x, *call) is None
    return triton if on_gpu else portable


def why_not(backends: dict[str, str], name: str, *call) -> str | None:
    """None if backend `name` computes this call, else the reason why it does not."""
    try:
        module = import_module(backends[name])
    except ImportError as error:
        return f"cannot be imported: {error}"
    return module.supports(*call)


def load(
    backends: dict[str, str], name: str, *call, advice: str = "Leave `backend` out."
) -> ModuleType:
    """The module of backend `name`. Raises ValueError with the reason, and `advice`, where it does
    not take the call."""
    reason = why_not(backends, name, *call)
    if reason is not None:
        raise ValueError(f"backend {name!r} does not take this call: {reason}. {advice}")
    return import_module(backends[name])
