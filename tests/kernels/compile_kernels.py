"""Compiles the Triton kernels for GPUs that are not there, and says what came out.

Run by test_compile.py in a process without TRITON_INTERPRET; by hand it prints a table:
    python -m tests.kernels.compile_kernels [--arch sm_90] [--quick] [--json]
"""

import argparse
import json
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.kernels.compile_quant import LAUNCHES
from vdit_sparse.kernels.block_mass.triton import block_mass_forward
from vdit_sparse.kernels.block_mass.triton import choose_tile as mass_tile
from vdit_sparse.kernels.block_sparse import tiles
from vdit_sparse.kernels.block_sparse.int8.triton import int8_forward
from vdit_sparse.kernels.block_sparse.int8.triton import tile_of as int8_tile
from vdit_sparse.kernels.block_sparse.triton import block_sparse_forward
from vdit_sparse.kernels.quant import channels_of
from vdit_sparse.kernels.quant.triton import limit_of
from vdit_sparse.kernels.triton_ops import width_of

KERNELS = {
    "attention": block_sparse_forward,
    "int8_bf16": int8_forward,
    "int8_fp8": int8_forward,
    "mass": block_mass_forward,
    **{name: launch.kernel for name, launch in LAUNCHES.items()},
}
NO_FP8 = ("sm_80", "gfx942")
INT32 = ("idx_ptr", "cnt_ptr", "valid_ptr", "kv_len_ptr", "skips_ptr")
SCALARS = ("smallest", "huge", "q_count", "k_count")
FP32 = (
    "lse_ptr",
    "mean_ptr",
    "balance_ptr",
    "scale_ptr",
    "inverse_ptr",
    "parts_ptr",
    "shift_ptr",
    "q_scale_ptr",
    "k_scale_ptr",
    "v_scale_ptr",
)
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
INSTRUCTIONS = (
    "wgmma.mma_async",
    "mma.sync",
    "tcgen05.mma",
    "cp.async.bulk.tensor",
    "cp.async.cg",
    "v_mfma",
)


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel; ends: "whole", "ragged", "kv_len", "valid", or "skip":
    whole, and small tiles are left out."""

    arch: str
    D: int = 128
    block: int = 128
    ends: str = "whole"
    dtype: str = "bf16"
    descriptors: bool = True
    kernel: str = "attention"


def variants(architectures: tuple[str, ...], quick: bool) -> list[Variant]:
    """What production uses: every table entry, and every kind of end for the widest heads; `quick`
    leaves four for each architecture."""
    if quick:
        found = [Variant(arch, ends=ends) for arch in architectures for ends in ("whole", "kv_len")]
        found += [
            Variant(arch, ends="kv_len", kernel="int8_bf16" if arch in NO_FP8 else "int8_fp8")
            for arch in architectures
        ]
        return found + [Variant(arch, ends="valid", kernel="mass") for arch in architectures]
    found = []
    for arch in architectures:
        found += int8_variants(arch)
        found += [
            Variant(arch, D, block, ends, kernel="mass")
            for D in (64, 128)
            for block in (64, 128)
            for ends in ("whole", "valid")
        ]
        found += [Variant(arch, 96, ends="valid", kernel="mass")]
        found += [Variant(arch, 256, ends="valid", kernel="mass")]
        found += [Variant(arch, ends="valid", dtype="fp32", kernel="mass")]
        found += [Variant(arch, D, block) for D in (64, 128) for block in (64, 128)]
        found += [Variant(arch, D, ends="kv_len") for D in (64, 128)]
        found += [Variant(arch, block=block, ends="valid") for block in (64, 128)]
        found += [Variant(arch, ends="ragged")]
        if arch != "sm_100":
            found += [Variant(arch, ends="skip", descriptors=False)]
        found += [Variant(arch, 96, ends="ragged"), Variant(arch, 256, ends="ragged")]
        found += [Variant(arch, dtype="fp32")]
        if tiles.TILES[(arch, 128, 128)].descriptors:
            found += [Variant(arch, D, 128, "ragged", descriptors=False) for D in (64, 128)]
    return found


def int8_variants(arch: str) -> list[Variant]:
    """The 8-bit precisions and the kernels that quantise for them."""
    found = []
    for name in ("int8_bf16", "int8_fp8"):
        if name == "int8_fp8" and arch in NO_FP8:
            continue
        found += [Variant(arch, D, kernel=name) for D in (64, 128)]
        found += [Variant(arch, 64, ends="kv_len", kernel=name)]
        found += [Variant(arch, block=block, ends="valid", kernel=name) for block in (64, 128)]
        found += [Variant(arch, 256, ends="ragged", kernel=name)]
        if tiles.TILES[(arch, 128, 128)].descriptors:
            found += [Variant(arch, ends="ragged", descriptors=False, kernel=name)]
    names = [name for name in LAUNCHES if name != "values" or arch not in NO_FP8]
    return found + [
        Variant(arch, D, ends="valid", kernel=name) for name in names for D in (128, 256)
    ]


def tile_for(variant: Variant) -> tiles.Tile:
    """What production chooses."""
    arch, D, block, name = variant.arch, variant.D, variant.block, variant.kernel
    width = width_of(D)
    itemsize = 4 if variant.dtype == "fp32" else 2
    fits = D in (64, 128) and variant.descriptors
    if name in LAUNCHES:
        launch = LAUNCHES[name]
        limit = limit_of(arch, D) if name in ("queries", "keys") else {}
        rows, registers = launch.rows or block, limit.get("maxnreg")
        return tiles.Tile(rows, block, launch.warps, 3, registers=registers)
    if name == "int8_fp8":
        fits = fits and int(arch.removeprefix("sm_")) >= 90
        return int8_tile(arch, D, itemsize, (block,) * 2, fits, name)
    fits = fits and itemsize == 2
    if name == "mass":
        return mass_tile(arch, width, itemsize, block, fits)
    fits = fits and variant.ends != "valid"
    if name == "int8_bf16":
        return int8_tile(arch, D, itemsize, (block,) * 2, fits, name)
    return tiles.tile_for(arch, width, itemsize, (block,) * 2, fits)


def compile_variant(variant: Variant) -> dict:
    """Registers and spilled bytes of a thread, shared memory of a program, and instructions."""
    width = width_of(variant.D, 32 if "int8" in variant.kernel else 16)
    tile = tile_for(variant)
    compiled = triton.compile(_source(variant, tile, width), _target(variant.arch), tile.options)
    resources = _amd(compiled) if variant.arch.startswith("gfx") else _nvidia(compiled)
    code = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    return {
        **asdict(variant),
        "tile": f"{tile.rows}x{tile.keys} w{tile.warps} s{tile.stages}"
        + (" tma" if tile.descriptors else ""),
        **resources,
        "shared_bytes": compiled.metadata.shared,
        "instructions": {name: code.count(name) for name in INSTRUCTIONS if name in code},
    }


def _source(variant: Variant, tile: tiles.Tile, width: int) -> ASTSource:
    kernel = KERNELS[variant.kernel]
    names = kernel.arg_names
    constants = {
        "D": variant.D,
        "BD": width,
        "BLOCK_Q": variant.block,
        "BLOCK_K": variant.block,
        "BM": tile.rows,
        "BN": tile.keys,
        "GROUP": min(tile.rows, variant.block),
        "ROWS": tile.rows,
        "RAGGED": variant.ends not in ("whole", "skip"),
        "CHANNELS": channels_of(variant.D),
        "PRECISION": "ieee" if variant.dtype == "fp32" else "tf32",
    }
    if variant.ends != "kv_len":
        constants["kv_len_ptr"] = None
    if variant.ends != "skip":
        constants["skips_ptr"] = None
    if variant.ends != "valid":
        constants |= {"valid_ptr": None, "real_ptr": None, "count_ptr": None}
    if variant.kernel == "int8_bf16":
        constants["v_scale_ptr"] = None
    if variant.kernel in LAUNCHES:
        launch = LAUNCHES[variant.kernel]
        constants |= launch.constants | dict.fromkeys(launch.absent)
    if not tile.descriptors:
        constants |= dict.fromkeys(("q_desc", "k_desc", "v_desc"))
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: _type(name, variant, tile, width) for name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = [
        (names.index(name),)
        for name in names
        if (name.endswith("_ptr") or re.fullmatch("(q|k|v|x|out)_[bhs]", name))
        and signature[name] != "constexpr"
    ]
    return ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        dict.fromkeys(aligned, [["tt.divisibility", 16]]),
    )


def _type(name: str, variant: Variant, tile: tiles.Tile, width: int) -> str:
    if name.endswith("_desc"):
        shape = [tile.rows if name == "q_desc" else tile.keys, width]
        if name == "v_desc" and variant.kernel == "int8_fp8":
            shape.reverse()
        return f"tensordesc<{_number(name, variant)}[1, 1, {shape[0]}, {shape[1]}]>"
    if name.endswith("_ptr"):
        return f"*{_number(name, variant)}"
    return "fp32" if name in ("scale", "scale_log2", "skip_log2", *SCALARS) else "i32"


def _number(name: str, variant: Variant) -> str:
    """The dtype of what a pointer or descriptor reads."""
    kernel = variant.kernel
    if name in FP32 or (name == "out_ptr" and kernel in ("mass", *LAUNCHES)) or kernel == "join":
        return "fp32"
    if name[0] in "qk" and name[1] == "_" and "int8" in kernel:
        return "i8"
    if name == "values_ptr":
        return "fp8e4nv" if kernel == "values" else "i8"
    if name[0] == "v" and name[1] == "_" and kernel == "int8_fp8":
        return "fp8e4nv"
    if name == "real_ptr":
        return "i1"
    return "i32" if name in INT32 else variant.dtype


def _target(arch: str) -> GPUTarget:
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch[3:]), 32)


def _nvidia(compiled) -> dict:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # The kernel has no arrays of its own: whatever lies on its stack was spilled there.
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", text).groups()
    return {"registers": int(registers), "spilled_bytes": int(stack) + int(local)}


def _amd(compiled) -> dict:
    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", compiled.asm["amdgcn"]).group(1))

    spilled = field("vgpr_spill_count") + field("sgpr_spill_count")
    return {"registers": field("vgpr_count"), "spilled_bytes": 4 * spilled}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="*", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with ProcessPoolExecutor(2) as pool:
        rows = list(pool.map(compile_variant, variants(tuple(arguments.arch), arguments.quick)))
    if arguments.json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(
            f"{row['kernel']:9} {row['arch']:7} D={row['D']:<3} {row['block']:<3} "
            f"{row['ends']:6} {row['dtype']:4} "
            f"{row['tile']:17} {row['registers']:3} registers {row['spilled_bytes']:4} spilled "
            f"{row['shared_bytes'] / 1024:5.0f} KiB {row['instructions']}"
        )


if __name__ == "__main__":
    main()
