"""The offline searches by the name of the method that they calibrate."""

from vdit_sparse.eval.calibrators.paro import PAROSearch
from vdit_sparse.eval.calibrators.sparse_vdit import SparseVDiTSearch

CALIBRATORS: dict[str, type[PAROSearch] | type[SparseVDiTSearch]] = {
    "paro": PAROSearch,
    "sparse-vdit": SparseVDiTSearch,
}

__all__ = ["CALIBRATORS", "PAROSearch", "SparseVDiTSearch"]
