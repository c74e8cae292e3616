"""Compiles the Hopper kernel where no GPU is, and says what came out.

Run by test_hopper_compile.py in a process without TRITON_INTERPRET; by hand it prints a table:
    python tests/kernels/compile_hopper.py [--quick] [--json]
"""

import argparse
import json
import re
import subprocess
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from vdit_sparse.kernels.block_sparse.hopper.kernel import hopper_forward
from vdit_sparse.kernels.block_sparse.hopper.variants import Variant, variant_for

NUMBERS = {"bf16": gl.bfloat16, "fp16": gl.float16, "i8": gl.int8, "fp8e4nv": gl.float8e4nv}
FP32 = ("q_scale_ptr", "k_scale_ptr", "v_scale_ptr", "shift_ptr", "lse_ptr")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Build:
    """One specialisation; ends: "whole", "kv_len" or "valid"; changes: fields of the variant."""

    D: int = 128
    blocks: tuple[int, int] = (128, 128)
    precision: str = "bf16"
    ends: str = "whole"
    dtype: str = "bf16"
    changes: tuple[tuple[str, int], ...] = ()
    skips: bool = False

    @property
    def variant(self) -> Variant:
        chosen = variant_for(self.D, self.blocks, self.precision, self.ends == "valid")
        return replace(chosen, **dict(self.changes))


NARROW = (("keys", 64), ("stages", 3), ("lone", False))
LONE = (("stages", 2), ("lone", True))
ENDS = ("whole", "kv_len", "valid")
PLAIN = (("persistent", False), ("longest_first", False), ("pingpong", False), ("landmark", False))
MANY = (("persistent", True), ("longest_first", True))
TURNS = (("pingpong", True),)
MARK, NO_MARK = (("landmark", True),), (("landmark", False),)


def builds(quick: bool) -> list[Build]:
    """What production uses, and what the study tries; `quick` leaves four."""
    if quick:
        return [
            Build(ends="kv_len"),
            Build(blocks=(64, 128)),
            Build(D=64, precision="int8_fp8"),
            Build(changes=MANY),
        ]
    every = [(128, 128), (128, 64), (64, 128), (64, 64)]
    found = [Build(D, blocks) for D in (64, 128) for blocks in every]
    found += [Build(blocks=blocks, ends=ends) for blocks in every for ends in ("kv_len", "valid")]
    found += [
        Build(D, blocks, precision, ends)
        for D in (64, 128)
        for blocks in ((128, 128), (64, 64))
        for precision in ("int8_bf16", "int8_fp8")
        for ends in ("whole", "valid")
    ]
    found += [Build(D, blocks, skips=True) for D in (64, 128) for blocks in every]
    found += [Build(ends="valid", skips=True), Build(blocks=(64, 64), ends="kv_len", skips=True)]
    found += [Build(dtype="fp16")]
    found += [Build(D, blocks, changes=MARK) for D in (64, 128) for blocks in every]
    found += [Build(precision=precision, changes=NO_MARK) for precision in ("bf16", "int8_fp8")]
    found += [Build(D, changes=PLAIN, ends=ends) for D in (64, 128) for ends in ENDS[:2]]
    found += [Build(changes=TURNS), Build(64, changes=TURNS), Build(blocks=(128, 64), changes=MANY)]
    found += [
        Build(precision=precision, changes=MANY, ends=ends)
        for precision in ("int8_bf16", "int8_fp8")
        for ends in ENDS
    ]
    found += [
        Build(precision="int8_bf16", changes=(*MANY, *TURNS)),
        Build(ends="valid", changes=MANY),
    ]
    found += [Build(D=64, blocks=(64, 128), changes=LONE), Build(blocks=(64, 128), changes=NARROW)]
    return found + [Build(changes=(("keys", 64), ("stages", 4)))]


def compile_build(build: Build) -> dict:
    """Registers, spilled bytes, shared memory, warnings of ptxas, and instructions."""
    warnings.simplefilter("ignore")
    variant = build.variant
    compiled = triton.compile(_source(build), GPUTarget("cuda", 90, 32), variant.options)
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        source, object_ = Path(folder, "k.ptx"), Path(folder, "k.cubin")
        source.write_text(ptx)
        object_.write_bytes(compiled.asm["cubin"])
        said = _run("ptxas", "-v", "--gpu-name=sm_90a", str(source), "-o", f"{folder}/again")
        usage = _run("cuobjdump", "--dump-resource-usage", str(object_))
    _, stack, local = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage).groups()
    return {
        "build": f"{build.D} {build.blocks} {build.precision} {build.ends} {build.dtype}"
        + " skips" * build.skips,
        "changes": dict(build.changes),
        "programs": variant.programs,
        "spilled_bytes": int(stack) + int(local),
        "shared_bytes": compiled.metadata.shared,
        "serialised": re.findall(r"C75\d\d[^\n]*", said),
        "wgmma": sorted(set(re.findall(r"wgmma\.mma_async\S+", ptx))),
        "loads": ptx.count("cp.async.bulk.tensor"),
        "shuffles": ptx.count("shfl.sync.bfly"),
        "consumers": variant.consumers,
    }


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run(
        [str(TOOLS / tool), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout + done.stderr


def _source(build: Build) -> GluonASTSource:
    variant, names = build.variant, hopper_forward.arg_names
    constants = {"D": build.D, "BLOCK_Q": build.blocks[0], "BLOCK_K": build.blocks[1]}
    constants |= variant.constants
    absent = {
        "q_scale_ptr": build.precision == "bf16",
        "k_scale_ptr": build.precision == "bf16",
        "shift_ptr": build.precision == "bf16",
        "v_scale_ptr": build.precision != "int8_fp8",
        "kv_len_ptr": build.ends != "kv_len",
        "valid_ptr": build.ends != "valid",
        "order_ptr": not variant.longest_first,
        "taken_ptr": not variant.persistent,
        "skips_ptr": not build.skips,
    }
    constants |= {name: None for name, is_absent in absent.items() if is_absent}
    signature = {name: _type(name, build) for name in names} | dict.fromkeys(constants, "constexpr")
    aligned = [(names.index(n),) for n in names if n.endswith("_ptr") and n not in constants]
    return GluonASTSource(
        hopper_forward,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        dict.fromkeys(aligned, [["tt.divisibility", 16]]),
    )


def _type(name: str, build: Build) -> str:
    if name.endswith("_desc"):
        keys, D = build.variant.keys, build.D
        number = "i8" if build.precision != "bf16" and name[0] in "qk" else build.dtype
        rows, columns = (keys, D) if name[0] in "kv" else (64, D)
        if name == "v_desc" and build.precision == "int8_fp8":
            number, rows, columns = "fp8e4nv", D, keys
        shape = [1, 1, rows, columns]
        layout = gl.NVMMASharedLayout.get_default_for(shape, NUMBERS[number])
        return f"tensordesc<{number}{shape},{layout!r}>"
    if name.endswith("_ptr"):
        return "*fp32" if name in FP32 else "*i32"
    return "fp32" if name in ("scale", "skip_log2") else "i32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with ProcessPoolExecutor(2) as pool:
        rows = list(pool.map(compile_build, builds(arguments.quick)))
    if arguments.json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(
            f"{row['build']:42} {row['spilled_bytes']:3} spilled {row['shared_bytes'] / 1024:4.0f} "
            f"KiB {row['shuffles']:3} shuffles {row['serialised']} {row['changes']}"
        )


if __name__ == "__main__":
    main()
