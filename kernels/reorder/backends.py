"""The choice of a backend, for packages with one for GPUs ("triton") and one for all ("torch")."""

from importlib import import_module
from types import ModuleType

from torch import Tensor


def choose(backends: dict[str, str], backend: str | None, x: Tensor, *call) -> ModuleType:
    """The module that computes this call: the one named, else Triton on a GPU where it can, else
    torch. Raises ValueError for an unknown name and for a backend that does not take the call."""
    if backend is not None and backend not in backends:
        raise ValueError(f"backend must be one of {tuple(backends)} or None, got {backend!r}.")
    if backend is None:
        on_gpu = x.device.type == "cuda" and _reason(backends["triton"], x, *call) is None
        backend = "triton" if on_gpu else "torch"
    reason = _reason(backends[backend], x, *call)
    if reason is not None:
        raise ValueError(
            f"backend {backend!r} does not take this call: {reason}. Leave `backend` out."
        )
    return import_module(backends[backend])


def _reason(module: str, *call) -> str | None:
    try:
        return import_module(module).supports(*call)
    except ImportError as error:
        return f"cannot be imported: {error}"
