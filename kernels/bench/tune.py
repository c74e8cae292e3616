"""The candidates for one entry of block_sparse/tiles.py."""

from dataclasses import replace
from functools import partial

import triton

from vdit_sparse.kernels.bench.measure import Row, tflops, time_gpu, verify_rows
from vdit_sparse.kernels.bench.problem import Problem
from vdit_sparse.kernels.block_sparse import triton as backend
from vdit_sparse.kernels.block_sparse.tiles import Tile


def tune(problem: Problem, pattern: str, density: float) -> list[Row]:
    """Tiles by time, fastest first; those that do not compile or are wrong are printed and left
    out."""
    tensors, mask = problem.tensors(), problem.mask(pattern, density)
    scale, rows = problem.dim**-0.5, []
    small = replace(problem, heads=2, tokens=1000)
    small_tensors, small_mask = small.tensors(), small.mask("random", 0.5)
    for tile in candidates(problem.block):
        call = partial(backend.launch, scale=scale, kv_len=None, tile=tile)
        try:
            error = verify_rows(call(*small_tensors, small_mask)[0], small_tensors, small_mask)
            ms = time_gpu(partial(call, *tensors, mask))
        except (triton.OutOfResources, triton.CompilationError, RuntimeError) as failed:
            print(f"{tile}: {str(failed).splitlines()[0]}")
            continue
        share = mask.density()
        rows.append(Row(str(tile), pattern, share, ms, tflops(tensors[0], share, ms), error))
    return sorted(rows, key=lambda each: each.ms)


def candidates(block: int) -> list[Tile]:
    """Tiles worth trying for query and key blocks of `block` tokens."""
    shapes = [(r, k) for r in (64, 128) for k in (64, 128) if r <= block and k <= block]
    plain = [
        Tile(r, k, warps, stages, descriptors)
        for r, k in shapes
        for warps in (4, 8)
        for stages in (2, 3)
        for descriptors in (True, False)
        if warps * 16 <= r
    ]
    capped = [Tile(128, 64, 8, stages, True, 128) for stages in (2, 3) if block == 128]
    return plain + capped
