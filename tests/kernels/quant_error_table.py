"""Errors of 8-bit attention against float64, for docs/performance.md, on a CPU:

    python -m tests.kernels.quant_error_table

Random normal q, k, v of 1,024 tokens, four heads, and those of the bundled model, in bf16, with one
channel of those named ten times as large; test_quant_errors.py holds all backends to the bars.
"""

import torch
from torch import Tensor

from tests.kernels.test_block_sparse_int8 import attend, error_of, in_float64
from tests.kernels.test_quant_errors import BARS, from_the_model, prepared


def random(D: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 1, 4, 1024, D)


def error(q_k_v: tuple[Tensor, ...], block: int, precision: str, outlier: str) -> float:
    """Relative L2 error of the reference."""
    given = prepared(q_k_v, outlier, block, "cpu", torch.bfloat16)
    out, _ = attend("reference", *given, precision)
    return float(error_of(out, in_float64(*given)[0]))


if __name__ == "__main__":
    sources = {"D 64": (random(64), 64), "D 128": (random(128), 128)}
    sources["the model"] = (from_the_model(), 128)
    for precision in BARS:
        for outlier in ("", "q", "k", "qk", "qkv"):
            errors = [f"{name} {error(*s, precision, outlier):.4f}" for name, s in sources.items()]
            print(f"{precision:10} outlier in {outlier or 'none':5} {', '.join(errors)}")
