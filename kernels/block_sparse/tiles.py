"""Which tile the Triton kernel uses where: a table written by hand, no autotuning.

Autotuning would time kernels again for each new length, in the middle of a run and under a graph
capture. `python -m vdit_sparse.kernels.bench --tune` measures the candidates for this table.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch


@dataclass(frozen=True)
class Tile:
    """One way to compile the kernel.

    rows, keys: queries of a program and keys of a step, tokens; warps: warps (NVIDIA) or waves
    (AMD) of a program; stages: depth of the software pipeline; descriptors: read q, k and v
    through tensor descriptors (TMA, NVIDIA sm_90 and later) where their layout allows; registers:
    upper limit of a thread, so that two programs fit a multiprocessor, or None.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    descriptors: bool = False
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What Triton compiles with."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


# (architecture, D rounded up to a power of two, query block) -> tile, for two-byte dtypes.
TILES = {
    ("sm_80", 64, 128): Tile(128, 64, 8, 3),
    ("sm_80", 64, 64): Tile(64, 64, 4, 3),
    ("sm_80", 128, 128): Tile(128, 64, 8, 3),
    ("sm_80", 128, 64): Tile(64, 32, 4, 3),
    ("sm_89", 64, 128): Tile(128, 64, 8, 2),
    ("sm_89", 64, 64): Tile(64, 64, 4, 2),
    ("sm_89", 128, 128): Tile(128, 64, 8, 2),
    ("sm_89", 128, 64): Tile(64, 32, 4, 2),
    ("sm_90", 64, 128): Tile(64, 128, 4, 3, descriptors=True),
    ("sm_90", 64, 64): Tile(64, 128, 4, 3, descriptors=True),
    ("sm_90", 128, 128): Tile(128, 64, 4, 2, descriptors=True),
    ("sm_90", 128, 64): Tile(64, 64, 4, 2, descriptors=True),
    ("sm_100", 64, 128): Tile(128, 64, 4, 3, descriptors=True),
    ("sm_100", 64, 64): Tile(64, 64, 4, 3, descriptors=True),
    ("sm_100", 128, 128): Tile(128, 64, 4, 3, descriptors=True),
    ("sm_100", 128, 64): Tile(64, 64, 4, 3, descriptors=True),
    ("sm_120", 64, 128): Tile(128, 64, 8, 2),
    ("sm_120", 64, 64): Tile(64, 64, 4, 2),
    ("sm_120", 128, 128): Tile(128, 64, 8, 2),
    ("sm_120", 128, 64): Tile(64, 32, 4, 2),
    ("gfx942", 64, 128): Tile(128, 64, 4, 2),
    ("gfx942", 64, 64): Tile(64, 64, 4, 2),
    ("gfx942", 128, 128): Tile(128, 64, 4, 1),
    ("gfx942", 128, 64): Tile(64, 64, 4, 1),
}
# (D rounded up, bytes of the dtype) -> tile that fits every architecture. Four bytes are multiplied
# exactly, without matrix instructions: slow, for tests and comparisons.
SMALL_TILES = {
    (256, 2): Tile(64, 32, 8, 2),
    (64, 4): Tile(32, 32, 8, 2),
    (128, 4): Tile(32, 32, 8, 2),
    (256, 4): Tile(32, 32, 8, 1),
}
# What pointers need where the layout rules descriptors out: the addresses take registers.
POINTER_TILES = {
    ("sm_90", 64, 128): Tile(128, 64, 4, 3),
    ("sm_90", 64, 64): Tile(64, 64, 4, 3),
    ("sm_90", 128, 128): Tile(128, 64, 8, 3),
    ("sm_90", 128, 64): Tile(64, 64, 4, 2),
    ("sm_100", 128, 128): Tile(128, 64, 8, 3),
}
# Where the tiles above would spill in the 8-bit kernel; by registers alone, not measured.
INT8_TILES = {
    ("sm_90", 128, 128, "int8_fp8"): Tile(64, 128, 4, 2, descriptors=True),
    ("sm_100", 128, 128, "int8_bf16"): Tile(128, 64, 8, 3, descriptors=True),
    ("sm_100", 128, 128, "int8_fp8"): Tile(128, 64, 8, 3, descriptors=True),
    ("sm_120", 64, 128, "int8_fp8"): Tile(64, 64, 4, 2),
}


@cache
def architecture(device: torch.device) -> str:
    """The name of `device` among GPUs: "sm_90", "gfx942"; "cpu" for Triton's interpreter."""
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def nearest(arch: str) -> str:
    """The architecture in `TILES` whose tiles serve `arch`."""
    if arch.startswith("gfx"):
        return "gfx942"
    if not arch.startswith("sm_"):
        return "sm_80"
    known = sorted({int(name[3:]) for name, _, _ in TILES if name.startswith("sm_")})
    older = [version for version in known if version <= int(arch[3:])]
    return f"sm_{older[-1] if older else known[0]}"


def tile_for(
    arch: str,
    width: int,
    itemsize: int,
    blocks: tuple[int, int],
    descriptors: bool = False,
    precision: str = "bf16",
) -> Tile:
    """The tile on `arch` for `width`, D rounded up to a power of two, and query and key blocks of
    `blocks` tokens; itemsize: bytes of a value; `descriptors`: whether the layout allows them."""
    key = (nearest(arch), max(width, 64), blocks[0])
    tile = SMALL_TILES.get((key[1], itemsize)) or INT8_TILES.get((*key, precision)) or TILES[key]
    if tile.descriptors and not descriptors:
        tile = POINTER_TILES.get(key) or replace(tile, descriptors=False)
    return replace(tile, rows=min(tile.rows, blocks[0]), keys=min(tile.keys, blocks[1]))
