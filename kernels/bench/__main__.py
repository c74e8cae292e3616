"""`python -m vdit_sparse.kernels.bench`, see the package."""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from vdit_sparse.kernels import bench
from vdit_sparse.kernels.bench.kernels import CPU_KERNELS, GPU_KERNELS, KERNELS
from vdit_sparse.kernels.bench.measure import as_data, masks_of, run
from vdit_sparse.kernels.bench.prepare import run_passes
from vdit_sparse.kernels.bench.problem import DTYPES, PATTERNS, Problem
from vdit_sparse.kernels.bench.report import line, machine, report, roofline
from vdit_sparse.kernels.bench.tune import tune


def main() -> None:
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
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--png", type=Path, help="a roofline")
    options = parser.parse_args()
    device = torch.device("cpu" if options.cpu else options.device)
    sizes = (options.heads, options.tokens, options.dim, options.block)
    problem = Problem(*sizes, DTYPES[options.dtype], device)
    names = options.backends or (CPU_KERNELS if device.type == "cpu" else GPU_KERNELS)
    with torch.inference_mode():
        if options.prepare:
            print(machine(device))
            run_passes(problem)
            return
        if options.tune:
            rows = tune(problem, options.pattern[0], options.density[0])
        else:
            masks = masks_of(problem, options.pattern, options.density)
            rows = run(problem, names, masks, lambda row: print(line(asdict(row)), flush=True))
    data, facts = as_data(problem, rows), machine(device)
    report(data, facts, options.csv)
    if options.png:
        roofline(data, facts["machine"], options.png)


if __name__ == "__main__":
    main()
