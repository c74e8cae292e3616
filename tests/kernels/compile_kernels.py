"""Compiles the Triton kernels for GPUs that are not there, and says what came out.

Run by test_compile.py in a process without TRITON_INTERPRET; by hand it prints a table:
    python tests/kernels/compile_kernels.py [--arch sm_90] [--quick] [--json]
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

from vdit_sparse.kernels.block_mass.triton import block_mass_forward
from vdit_sparse.kernels.block_mass.triton import choose_tile as mass_tile
from vdit_sparse.kernels.block_sparse import tiles
from vdit_sparse.kernels.block_sparse.triton import block_sparse_forward

KERNELS = {"attention": block_sparse_forward, "mass": block_mass_forward}
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
    """One specialisation of a kernel; ends: "whole", "ragged", "kv_len" or "valid"."""

    arch: str
    D: int = 128
    block: int = 128
    ends: str = "whole"
    dtype: str = "bf16"
    descriptors: bool = True
    kernel: str = "attention"


def variants(architectures: tuple[str, ...], quick: bool) -> list[Variant]:
    """What production uses: every table entry, and every kind of end for the widest heads; `quick`
    leaves three for each architecture."""
    if quick:
        found = [Variant(arch, ends=ends) for arch in architectures for ends in ("whole", "kv_len")]
        return found + [Variant(arch, ends="valid", kernel="mass") for arch in architectures]
    found = []
    for arch in architectures:
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
        found += [Variant(arch, 96, ends="ragged"), Variant(arch, 256, ends="ragged")]
        found += [Variant(arch, dtype="fp32")]
        if tiles.TILES[(arch, 128, 128)].descriptors:
            found += [Variant(arch, D, 128, "ragged", descriptors=False) for D in (64, 128)]
    return found


def compile_variant(variant: Variant) -> dict:
    """Registers and spilled bytes of a thread, shared memory of a program, and instructions."""
    width = max(16, triton.next_power_of_2(variant.D))
    itemsize = 4 if variant.dtype == "fp32" else 2
    fits = variant.D in (64, 128) and itemsize == 2 and variant.descriptors
    if variant.kernel == "mass":
        tile = mass_tile(variant.arch, width, itemsize, variant.block, fits)
    else:
        fits = fits and variant.ends != "valid"
        tile = tiles.tile_for(variant.arch, width, itemsize, (variant.block,) * 2, fits)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    if tile.registers is not None:
        options["maxnreg"] = tile.registers
    compiled = triton.compile(_source(variant, tile, width), _target(variant.arch), options)
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
        "RAGGED": variant.ends != "whole",
        "PRECISION": "ieee" if variant.dtype == "fp32" else "tf32",
    }
    if variant.ends != "kv_len":
        constants["kv_len_ptr"] = None
    if variant.ends != "valid":
        constants["valid_ptr"] = None
    if not tile.descriptors:
        constants |= dict.fromkeys(("q_desc", "k_desc", "v_desc"))
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: _type(name, variant.dtype, tile, width) for name in names}
    if variant.kernel == "mass":
        signature["out_ptr"] = "*fp32"
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = [
        (names.index(name),)
        for name in names
        if (name.endswith("_ptr") or re.fullmatch("(q|k|v|out)_[bhs]", name))
        and signature[name] != "constexpr"
    ]
    return ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        dict.fromkeys(aligned, [["tt.divisibility", 16]]),
    )


def _type(name: str, dtype: str, tile: tiles.Tile, width: int) -> str:
    if name in ("q_ptr", "k_ptr", "v_ptr", "out_ptr"):
        return f"*{dtype}"
    if name.endswith("_desc"):
        rows = tile.rows if name == "q_desc" else tile.keys
        return f"tensordesc<{dtype}[1, 1, {rows}, {width}]>"
    if name == "lse_ptr":
        return "*fp32"
    if name.endswith("_ptr"):
        return "*i32"
    return "fp32" if name == "scale_log2" else "i32"


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
