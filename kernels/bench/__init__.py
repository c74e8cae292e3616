"""How fast is block-sparse attention here, beside the dense and sparse kernels that there are?

    python -m vdit_sparse.kernels.bench                  GPU: TFLOP/s on kept blocks
    python -m vdit_sparse.kernels.bench --tune           GPU: candidates for block_sparse/tiles.py
    python -m vdit_sparse.kernels.bench --prepare --heads 40 --tokens 75600
                                                         GPU: norms, RoPE and orders before it
    python -m vdit_sparse.kernels.bench --skip --density 0.25
                                                         GPU: what `skip_threshold` gains
    python -m vdit_sparse.kernels.bench --cpu --tokens 3136 --heads 6 --dim 64 --density 0.35

Every number follows a comparison with exact attention in the same process; `--csv` appends rows
with machine, versions and commit. `vdit-sparse bench kernels` does this at the sizes of published
models.
"""

from vdit_sparse.kernels.bench.kernels import KERNELS
from vdit_sparse.kernels.bench.measure import Masked, run, time_gpu, verify_rows
from vdit_sparse.kernels.bench.problem import SHAPES, Problem, Shape
from vdit_sparse.kernels.bench.report import machine, report

__all__ = [
    "KERNELS",
    "SHAPES",
    "Masked",
    "Problem",
    "Shape",
    "machine",
    "report",
    "run",
    "time_gpu",
    "verify_rows",
]
