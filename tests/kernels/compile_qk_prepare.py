"""Compiles the kernels of `qk_prepare` for GPUs that are not there; run by test_qk_prepare.py in a
process without TRITON_INTERPRET. Prints one JSON list of resources: the kernel of Wan's rows for
every architecture, the others for the H200's; by hand, `all` compiles all for all."""

import json
import re
import sys

import triton
from triton.compiler import ASTSource

from tests.kernels.compile_kernels import ARCHITECTURES, _amd, _nvidia, _target
from vdit_sparse.kernels.qk_prepare.blocks_triton import WARPS, inverse_norms, prepare_tiles
from vdit_sparse.kernels.qk_prepare.triton import merge_tokens, prepare_tokens, tile_of_heads

# Name -> kernel, heads of 128, constants that make the variant.
VARIANTS = {
    "wan": (prepare_tokens, 40, {"ACROSS": True, "ROUND_FIRST": False, "back_ptr": None}),
    "hunyuan": (prepare_tokens, 24, {"ACROSS": False, "ROUND_FIRST": True}),
    "text": (
        prepare_tokens,
        24,
        {"ACROSS": False, "ROUND_FIRST": True, "cos_ptr": None, "sin_ptr": None},
    ),
    "merge": (merge_tokens, 40, {}),
    "norms": (inverse_norms, 40, {}),
    "means": (
        prepare_tiles,
        24,
        {"ROUND_FIRST": True, "norm_ptr": None},
    ),
    "means of all heads": (prepare_tiles, 40, {"ROUND_FIRST": False}),
}
FP32 = ("cos_ptr", "sin_ptr", "norm_ptr", "means_ptr")


def compile_variant(name: str, arch: str) -> dict:
    """Registers and spilled bytes of a thread, and bytes moved by a wide load or not."""
    kernel, heads, constants = VARIANTS[name]
    options = tile_of_heads(heads, 128)
    warps = options.pop("num_warps")
    if kernel is prepare_tiles:
        options = {"D": 128, "BD": 128, "ROWS": 128}
        warps = WARPS
    constants = {**constants, **options}
    names = kernel.arg_names
    signature = {each: _type(each, name) for each in names} | dict.fromkeys(constants, "constexpr")
    aligned = [
        (names.index(each),)
        for each in names
        if (each.endswith("_ptr") or re.fullmatch("(x|out|cos|sin)_[bhs]", each))
        and signature[each] != "constexpr"
    ]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(each),): value for each, value in constants.items()},
        dict.fromkeys(aligned, [["tt.divisibility", 16]]),
    )
    compiled = triton.compile(source, _target(arch), {"num_warps": warps})
    code = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    resources = _amd(compiled) if arch.startswith("gfx") else _nvidia(compiled)
    wide = "ld.global.v4.b32" in code or "_load_dwordx4" in code
    row = {"variant": name, "arch": arch, **resources, "shared": compiled.metadata.shared}
    return {**row, "wide": wide, "warps": warps}


def _type(name: str, variant: str) -> str:
    if not name.endswith("_ptr"):
        return "fp32" if name == "eps" else "i32"
    if name in ("back_ptr", "order_ptr"):
        return "*i64"
    if name in FP32 or (variant == "norms" and name == "out_ptr"):
        return "*fp32"
    return "*i16" if variant == "merge" else "*bf16"


if __name__ == "__main__":
    # "all": every kernel for every architecture.
    everything = sys.argv[1:] == ["all"]
    rows = [
        compile_variant(name, arch)
        for arch in ARCHITECTURES
        for name in VARIANTS
        if everything or name == "wan" or arch == "sm_90"
    ]
    print(json.dumps(rows))
