"""The methods by name, for the command line, presets and the contract tests."""

from vdit_sparse.method import SparseAttention
from vdit_sparse.methods.radial import RadialAttention

METHODS: dict[str, type[SparseAttention]] = {
    "radial": RadialAttention,
}

__all__ = ["METHODS", "RadialAttention"]
