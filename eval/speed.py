"""How long each method plans and attends, beside dense attention, at the size of a real video.

    python -m vdit_sparse.eval.speed --grid 21x45x80 --heads 40 --dim 128

Random q, k and v of one layer and batch row: what is measured here depends on the sizes and the
density alone. Offline methods get a random calibration of that density. Milliseconds are medians
of CUDA events (wall time on a CPU).
"""

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from vdit_sparse.calibration import Calibration
from vdit_sparse.call import Call, Note, Origin
from vdit_sparse.grid import Grid
from vdit_sparse.method import SparseAttention
from vdit_sparse.methods import METHODS
from vdit_sparse.methods.paro import pack
from vdit_sparse.pipelines.report import Stopwatch

STEPS = 50
SEARCH_STEP, SPARSE_STEP = 10, 12


def methods(density: float, block: int) -> Iterator[tuple[str, SparseAttention]]:
    """Each method near a density, as dense or search steps find it."""
    own = {
        "radial": {"block": block},
        "adaspa": {"density": density, "block": block},
        "draft": {"density": density, "block": block},
        "rettention": {"density": density, "block": block, "mask": "tile"},
    }
    for name, kind in METHODS.items():
        yield name, replace(kind(**own.get(name, {})), dense_steps=SEARCH_STEP)


def random_calibration(name: str, grid: Grid, heads: int, density: float, block: int):
    """A calibration with which `name` keeps about `density`; None for methods that need none."""
    nb = -(-grid.tokens // block)
    fields = {"block": block, "density": density, "stripes": "static", "every": 4, "sink_frames": 0}
    tensors = {
        "paro": lambda: {
            "transformer.order": torch.arange(heads, dtype=torch.int8)[None] % 6,
            "transformer.bin": torch.zeros(STEPS, dtype=torch.int16),
            "transformer.keep": pack(torch.rand(1, 1, heads, nb, nb) < density),
        },
        "sparse-vdit": lambda: {
            "transformer.modes": (torch.arange(heads, dtype=torch.int8) % 3 + 2).expand(
                STEPS, 1, heads
            )
        },
    }
    if name not in tensors:
        return None
    about = ("random", METHODS[name].__name__, fields, Origin(), grid, 1, STEPS)
    return Calibration(*about, prompts=(), seeds=(), versions={}, tensors=tensors[name]())


class Bench:
    """q, k and v of one layer on a device, and the time of dense attention on them."""

    def __init__(self, grid: Grid, heads: int, dim: int, rounds: int):
        self.grid, self.rounds = grid, rounds
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.device, dtype = device, torch.bfloat16 if device.type == "cuda" else torch.float32
        shape = (1, grid.tokens, heads, dim)
        self.qkv = [torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for _ in "qkv"]
        self.watch = Stopwatch()

    def time(self, call) -> float:
        """Median milliseconds of `call()` after one that does not count."""
        call()
        marks = []
        for _ in range(self.rounds):
            started = self.watch.start(self.device)
            call()
            marks.append(self.watch.stop(started))
        return statistics.median(self.watch.milliseconds(mark) for mark in marks)

    def dense(self) -> dict[str, float]:
        """Dense attention by each of torch's kernels."""
        if self.device.type == "cpu":
            return {"sdpa": self.time(lambda: scaled_dot_product_attention(*self.qkv))}
        kinds = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
        times = {}
        for name, kind in kinds.items():
            with sdpa_kernel(kind):
                times[name] = self.time(lambda: scaled_dot_product_attention(*self.qkv))
        return times

    def measure(self, method: SparseAttention, calibration: Calibration | None) -> dict:
        """Milliseconds of a search step, of building a plan, and of a sparse step without it."""
        first = self._call(SEARCH_STEP, {}, calibration)
        method(*self.qkv, first)
        memory, step = first.memory, SPARSE_STEP
        searched = self._mean_search(method, calibration) if first.note.searched else None
        plans: list[float] = []

        def sparse() -> Tensor:
            call = self._call(step, dict(memory), calibration)
            out = method(*self.qkv, call)
            plans.append(sum(self.watch.milliseconds(mark) for mark in call.note.plans))
            self.density = float(call.note.density)
            return out

        total = self.time(sparse)
        plan = statistics.median(plans[1:])
        return {"density": self.density, "search": searched, "plan": plan, "sparse": total - plan}

    def _mean_search(self, method, calibration) -> float:
        return self.time(lambda: method(*self.qkv, self._call(SEARCH_STEP, {}, calibration)))

    def _call(self, step: int, memory: dict, calibration: Calibration | None) -> Call:
        if calibration is not None:
            memory["calibration"] = calibration
        return Call(self.grid, 0, 1, step, STEPS, memory, note=Note(watch=self.watch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", default="21x45x80", help="latent tokens: frames x height x width")
    parser.add_argument("--heads", type=int, default=40)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    grid = Grid(*map(int, options.grid.split("x")))
    with torch.inference_mode():
        bench = Bench(grid, options.heads, options.dim, options.rounds)
        dense = bench.dense()
        best = min(dense.values())
        shape = f"{grid.tokens} tokens, {options.heads} heads of {options.dim}"
        print(f"{bench.device}, {shape}, dense ms: {dense}")
        print(f"{'method':<12}{'density':>8}{'search':>9}{'plan':>9}{'of dense':>9}{'sparse':>9}")
        for name, method in methods(options.density, options.block):
            about = (name, grid, options.heads, options.density, options.block)
            row = bench.measure(method, random_calibration(*about))
            search = "" if row["search"] is None else f"{row['search']:.2f}"
            print(
                f"{name:<12}{row['density']:8.3f}{search:>9}{row['plan']:9.3f}"
                f"{row['plan'] / best:9.2%}{row['sparse']:9.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
