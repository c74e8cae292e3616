"""Attention kernels at the sizes of published models, on masks of several kinds."""

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from vdit_sparse.app.bench_methods import sparse_methods
from vdit_sparse.call import Call
from vdit_sparse.grid import Grid
from vdit_sparse.kernels.bench.measure import Masked, Row, as_data, run
from vdit_sparse.kernels.bench.problem import Problem, Shape
from vdit_sparse.kernels.bench.report import line


@dataclass(frozen=True)
class KernelBench:
    """What to measure: `kernels` on masks of `patterns` at each of `densities`, and on those that
    `methods` make of random q and k near each, for every one of `shapes`; no kernel is begun
    `seconds` after the start."""

    shapes: dict[str, Shape]
    kernels: tuple[str, ...]
    patterns: tuple[str, ...]
    methods: tuple[str, ...]
    densities: tuple[float, ...]
    block: int
    device: torch.device
    dtype: torch.dtype
    seconds: float = math.inf


def measure(
    bench: KernelBench,
    say: Callable[[str], None],
    keep: Callable[[dict], None] = lambda row: None,
) -> Iterator[list[dict]]:
    """Rows of each shape as plain data, with its name and sizes in them; `say` and `keep` are given
    each row as soon as it is known."""
    deadline = time.monotonic() + bench.seconds
    for name, shape in bench.shapes.items():
        say(f"{name}: {shape.tokens} tokens, {shape.heads} heads of {shape.dim}")
        problem = Problem(
            shape.heads, shape.tokens, shape.dim, bench.block, bench.dtype, bench.device,
            frames=shape.frames if shape.frames > 1 else Problem.frames,
        )  # fmt: skip
        with torch.inference_mode():
            masks = [
                Masked(pattern, problem.mask(pattern, density))
                for density in bench.densities
                for pattern in bench.patterns
            ]
            rows = []

            def told(row: Row, name=name, problem=problem, rows=rows) -> None:
                say(line(asdict(row)))
                rows += [{"shape": name, **data} for data in as_data(problem, [row])]
                keep(rows[-1])

            own, failed = own_masks(bench, shape, problem)
            run(problem, bench.kernels, masks + own, told, deadline)
            for row in failed:
                told(row)
        yield rows


def own_masks(bench: KernelBench, shape: Shape, problem: Problem) -> tuple[list[Masked], list[Row]]:
    """The masks that the methods make, and a row with the reason for each that makes none."""
    grid = Grid(shape.frames, shape.height, shape.width, shape.text)
    masks, failed = [], []
    if not bench.methods:
        return masks, failed
    q, k, _ = problem.tensors()
    with tempfile.TemporaryDirectory() as folder:
        for density in bench.densities:
            about = (grid, shape.heads, density, bench.block, 1, Path(folder))
            for name, method in sparse_methods(bench.methods, *about):
                try:
                    plan = method.plan(q, k, Call(grid, 0, 1, 12, 50, {}))
                # A compiler or a driver may raise anything; the other methods still count.
                except Exception as error:
                    said = " ".join(str(error).split())[:160]
                    failed.append(Row("all", name, density, note=said))
                    continue
                tokens = grid.tokens if plan.order is None else plan.order.shape[-1]
                masks.append(Masked(name, plan.mask, tokens))
    return masks, failed
