"""The methods by name, for the command line, presets and the contract tests."""

from vdit_sparse.method import SparseAttention
from vdit_sparse.methods.adaspa import AdaSpaAttention
from vdit_sparse.methods.draft import DraftAttention
from vdit_sparse.methods.paro import PAROAttention
from vdit_sparse.methods.radial import RadialAttention
from vdit_sparse.methods.rettention import RettentionAttention
from vdit_sparse.methods.sparse_vdit import SparseVDiTAttention

METHODS: dict[str, type[SparseAttention]] = {
    "radial": RadialAttention,
    "sparse-vdit": SparseVDiTAttention,
    "adaspa": AdaSpaAttention,
    "draft": DraftAttention,
    "paro": PAROAttention,
    "rettention": RettentionAttention,
}

__all__ = ["METHODS", *(kind.__name__ for kind in METHODS.values())]
