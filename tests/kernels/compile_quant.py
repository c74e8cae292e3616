"""How production launches the kernels that quantise, for compile_kernels.py."""

from dataclasses import dataclass, field

from triton.runtime import KernelInterface

from vdit_sparse.kernels.quant import EVERY, LARGEST_BALANCE, SAMPLED, moments
from vdit_sparse.kernels.quant import triton as quant
from vdit_sparse.kernels.quant.reference import E4M3_LARGEST, INT8_LARGEST


@dataclass(frozen=True)
class Launch:
    """rows: tokens of a tile, None: a block's; constants: of the kernel, beside those that many
    have; absent: pointers that are None."""

    kernel: KernelInterface
    rows: int | None = None
    warps: int = moments.WARPS
    constants: dict = field(default_factory=dict)
    absent: tuple[str, ...] = ()


def _moments(queries: bool) -> Launch:
    constants = {"QUERIES": queries, "SAMPLED": SAMPLED, "EVERY": EVERY}
    constants["TILES"] = moments.MOMENT_TILES
    absent = ("real_ptr",) if queries else ()
    rows = moments.MOMENT_ROWS
    return Launch(moments.sampled_moments, rows, constants=constants, absent=absent)


LAUNCHES = {
    "largest": Launch(
        moments.largest_magnitudes,
        moments.LARGEST_ROWS,
        constants={"TILES": moments.LARGEST_TILES},
    ),
    "scales": Launch(moments.join_largest, warps=4, constants={"LARGEST": E4M3_LARGEST}),
    "query moments": _moments(queries=True),
    "key moments": _moments(queries=False),
    "join": Launch(moments.join_moments, warps=4, constants={"LARGEST": LARGEST_BALANCE}),
    "mean": Launch(quant.rotate_mean, warps=4),
    "queries": Launch(
        quant.quantize_rows, constants={"LARGEST": INT8_LARGEST}, absent=("real_ptr",)
    ),
    "keys": Launch(quant.quantize_rows, constants={"LARGEST": INT8_LARGEST}, absent=("shift_ptr",)),
    "values": Launch(
        quant.quantize_columns,
        quant.VALUE_ROWS,
        quant.VALUE_WARPS,
        {"LARGEST": E4M3_LARGEST, "PERMUTED": True},
    ),
}
