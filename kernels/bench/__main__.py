"""`python -m vdit_sparse.kernels.bench`, see the package."""

import argparse
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch

from vdit_sparse.kernels import bench
from vdit_sparse.kernels.bench.kernels import CPU_KERNELS, GPU_KERNELS, KERNELS
from vdit_sparse.kernels.bench.measure import Row, as_data, masks_of, run
from vdit_sparse.kernels.bench.prepare import run_passes
from vdit_sparse.kernels.bench.problem import DTYPES, PATTERNS, Problem
from vdit_sparse.kernels.bench.report import append, line, machine, report, roofline
from vdit_sparse.kernels.bench.skip import run_skips
from vdit_sparse.kernels.bench.tune import tune


def main() -> None:
    options = parsed()
    device = torch.device("cpu" if options.cpu else options.device)
    sizes = (options.heads, options.tokens, options.dim, options.block)
    problem = Problem(*sizes, DTYPES[options.dtype], device)
    facts = machine(device)
    with torch.inference_mode():
        if options.prepare or options.skip:
            print(facts, flush=True)
            told = run_passes if options.prepare else run_skips
            told(problem, options.density[0])
            return
        rows = as_data(problem, measured(problem, options, facts))
    report(rows, facts)
    if options.png:
        roofline(rows, facts["machine"], options.png)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vdit_sparse.kernels.bench", description=bench.__doc__.splitlines()[0]
    )
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--block", type=int, default=128, choices=(64, 128))
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--density", type=float, nargs="+", default=[0.25, 0.1])
    parser.add_argument("--pattern", nargs="+", default=["local", "random"], choices=PATTERNS)
    parser.add_argument("--backends", nargs="+", choices=KERNELS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cpu", action="store_true", help="the same as --device cpu")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--skip", action="store_true")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no kernel later")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--png", type=Path, help="a roofline")
    return parser.parse_args()


def measured(problem: Problem, options: argparse.Namespace, facts: dict) -> list[Row]:
    """The rows, each printed and appended to the CSV file as soon as it is known."""

    def tell(row: Row) -> None:
        print(line(asdict(row)), flush=True)
        if options.csv:
            append(options.csv, as_data(problem, [row]), facts)

    if options.tune:
        rows = tune(problem, options.pattern[0], options.density[0])
        for row in rows:
            tell(row)
        return rows
    deadline = time.monotonic() + options.seconds
    names = options.backends or (CPU_KERNELS if problem.device.type == "cpu" else GPU_KERNELS)
    masks = masks_of(problem, options.pattern, options.density)
    return run(problem, names, masks, tell, deadline)


if __name__ == "__main__":
    main()
