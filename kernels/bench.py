"""How fast is block-sparse attention here, beside the dense and sparse kernels that torch has?

    python -m vdit_sparse.kernels.bench                  GPU: TFLOP/s on kept blocks
    python -m vdit_sparse.kernels.bench --tune           GPU: candidates for block_sparse/tiles.py
    python -m vdit_sparse.kernels.bench --cpu --tokens 3136 --heads 6 --dim 64 --density 0.35

Every number follows a comparison with the reference in the same process; `--csv` appends rows with
machine, versions and commit.
"""

import argparse
import csv
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.block_sparse import block_sparse_attention
from vdit_sparse.kernels.block_sparse import triton as triton_backend
from vdit_sparse.kernels.block_sparse.reference import forward as reference_forward
from vdit_sparse.kernels.block_sparse.tiles import Tile

Attend = Callable[[], Tensor]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Relative L2 error that an 8-bit kernel may have, its quantising included in what is timed.
EIGHT_BITS = {"int8_bf16": 1.6e-2, "int8_fp8": 4.5e-2}
GPU_KERNELS = ("triton", "triton-pointers", "flex", "sdpa-cudnn", "sdpa-flash", *EIGHT_BITS)
CPU_KERNELS = ("gather", "sdpa")
DENSE = {
    "sdpa": None,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
}
FRAMES = 16  # of the local pattern


@dataclass(frozen=True)
class Problem:
    """What is timed: one attention call of `heads` heads over `tokens` tokens."""

    heads: int
    tokens: int
    dim: int
    block: int
    dtype: torch.dtype
    device: torch.device

    def tensors(self) -> list[Tensor]:
        """q, k and v as a transformer gives them, `[1, H, S, D]` views of `[1, S, H, D]`."""
        shape = (1, self.tokens, self.heads, self.dim)
        make = partial(torch.randn, shape, dtype=self.dtype, device=self.device)
        return [make().transpose(1, 2) for _ in range(3)]

    def mask(self, pattern: str, density: float) -> BlockMask:
        """`density` of the key blocks in each row: near ones in space and time ("local"), or any
        ("random", the worst case for caches); a list per head."""
        blocks = -(-self.tokens // self.block)
        scores = torch.rand(self.heads, blocks, blocks, device=self.device)
        if pattern == "local":
            at = torch.arange(blocks, device=self.device)
            frame, place = at * FRAMES // blocks, at % -(-blocks // FRAMES)
            distance = (place[:, None] - place).abs() + 2.0 * (frame[:, None] - frame).abs()
            scores = scores - distance
        kept = scores.topk(max(1, round(density * blocks)), -1).indices
        keep = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, kept, True)
        return BlockMask.from_keep(keep, self.block)


def kernel(name: str, tensors: list[Tensor], mask: BlockMask | None) -> Attend:
    """The call to time; dense kernels take no mask."""
    q, k, v = tensors
    if name in DENSE:
        if DENSE[name] is None:
            return lambda: scaled_dot_product_attention(q, k, v)
        return partial(_dense, DENSE[name], q, k, v)
    if name == "flex":
        return _flex(q, k, v, mask)
    if name == "triton-pointers":
        tile = triton_backend.tile_of(q, mask, descriptors=False)
        return lambda: triton_backend.launch(q, k, v, mask, q.shape[-1] ** -0.5, None, tile)[0]
    if name in EIGHT_BITS:
        return lambda: block_sparse_attention(q, k, v, mask, precision=name)[0]
    return lambda: block_sparse_attention(q, k, v, mask, backend=name)[0]


def _dense(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Attend:
    from torch.nn.attention.flex_attention import flex_attention

    # Past its limit of recompilations dynamo would silently time the unfused eager form.
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    block_mask = mask.to_flex(q.shape[2], k.shape[2])
    return lambda: compiled(q, k, v, block_mask=block_mask)


def verify(attend: Attend, tensors: list[Tensor], mask: BlockMask | None, name: str) -> float:
    """Largest error against the reference in float64; raises if it is more than rounding."""
    q, k, v = tensors
    if mask is None:
        n = -(-q.shape[2] // 128)
        mask = BlockMask.from_keep(torch.ones(n, n, dtype=torch.bool, device=q.device))
    expected, _ = reference_forward(
        *(x.double() for x in tensors), mask, q.shape[-1] ** -0.5, compute=torch.float64
    )
    difference = attend().double() - expected
    error = float(difference.abs().max())
    if name in EIGHT_BITS:
        relative = float(difference.norm() / expected.norm())
        if not relative <= EIGHT_BITS[name]:
            raise RuntimeError(f"{name} has a relative error of {relative:.2e}: not timed.")
        return error
    # Two roundings of numbers of the size of the largest output.
    limit = 4 * torch.finfo(q.dtype).eps * float(expected.abs().max()) + 1e-6
    if not error <= limit:
        raise RuntimeError(f"{name} is wrong by {error:.2e} (limit {limit:.2e}): not timed.")
    return error


def time_gpu(attend: Attend) -> float:
    """Median milliseconds."""
    return triton.testing.do_bench(attend, warmup=50, rep=200, return_mode="median")


def time_interleaved(calls: dict[str, Attend], rounds: int) -> dict[str, float]:
    """Median milliseconds of each call, taken in turns so that other load hits all alike."""
    seconds = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def machine(device: torch.device) -> dict[str, str]:
    """What a number needs beside it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    if device.type == "cpu":
        name = f"cpu, {torch.get_num_threads()} threads"
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    return {
        "machine": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit,
    }


def row(problem: Problem, name: str, mask: BlockMask | None, pattern: str, ms: float) -> dict:
    """One line of the result; TFLOP/s count the kept blocks only."""
    density = 1.0 if mask is None else mask.density()
    flops = 4 * problem.dim * problem.heads * problem.tokens**2 * density
    return {
        "kernel": name,
        "pattern": pattern,
        "density": round(density, 4),
        "ms": round(ms, 3),
        "tflops": round(flops / ms / 1e9, 2),
        "heads": problem.heads,
        "tokens": problem.tokens,
        "dim": problem.dim,
        "block": problem.block,
        "dtype": str(problem.dtype).removeprefix("torch."),
    }


def checked(problem: Problem, names: list[str]) -> list[str]:
    """`names` after a green comparison of each on a small ragged problem."""
    small = Problem(3, 1000, problem.dim, problem.block, problem.dtype, problem.device)
    tensors, mask = small.tensors(), small.mask("random", 0.5)
    for name in names:
        used = None if name in DENSE else mask
        error = verify(kernel(name, tensors, used), tensors, used, name)
        print(f"verified {name}: largest error {error:.1e}")
    return names


def run(problem: Problem, names: list[str], masks: list[tuple[str, float]]) -> list[dict]:
    """Every kernel on every mask, dense kernels once; on the CPU in turns."""
    tensors, rows = problem.tensors(), []
    dense = [name for name in names if name in DENSE]
    sparse = [name for name in names if name not in DENSE]
    on_gpu = problem.device.type == "cuda"
    if on_gpu:
        for name in dense:
            rows.append(row(problem, name, None, "dense", time_gpu(kernel(name, tensors, None))))
    for pattern, density in masks:
        mask = problem.mask(pattern, density)
        calls = {name: kernel(name, tensors, mask) for name in sparse}
        if on_gpu:
            times = {name: time_gpu(call) for name, call in calls.items()}
        else:
            calls |= {name: kernel(name, tensors, None) for name in dense}
            times = time_interleaved(calls, rounds=11)
        for name, ms in times.items():
            used = None if name in DENSE else mask
            rows.append(row(problem, name, used, pattern, ms))
    return rows


def tune(problem: Problem, pattern: str, density: float) -> list[dict]:
    """The candidates for one table entry, fastest first; those that do not compile are left out."""
    tensors, mask = problem.tensors(), problem.mask(pattern, density)
    scale, rows = problem.dim**-0.5, []
    small = Problem(2, 1000, problem.dim, problem.block, problem.dtype, problem.device)
    small_tensors, small_mask = small.tensors(), small.mask("random", 0.5)
    for tile in candidates(problem.block):
        call = partial(triton_backend.launch, scale=scale, kv_len=None, tile=tile)
        check = partial(call, *small_tensors, small_mask)
        try:
            verify(lambda check=check: check()[0], small_tensors, small_mask, str(tile))
            ms = time_gpu(partial(call, *tensors, mask))
        except (triton.OutOfResources, triton.CompilationError, RuntimeError) as error:
            print(f"{tile}: {str(error).splitlines()[0]}")
            continue
        rows.append(row(problem, str(tile), mask, pattern, ms))
    return sorted(rows, key=lambda each: each["ms"])


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


def report(rows: list[dict], facts: dict[str, str], path: Path | None) -> None:
    """Prints the rows as a table, and appends them to a CSV file if asked."""
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    first = rows[0]
    print({name: first[name] for name in ("heads", "tokens", "dim", "block", "dtype")})
    for each in rows:
        print(
            f"{each['pattern']:7} {each['density']:6.3f} {each['ms']:9.3f} ms "
            f"{each['tflops']:7.1f} TFLOP/s  {each['kernel']}"
        )
    if path is not None:
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, [*first, *facts])
            if new:
                writer.writeheader()
            writer.writerows(each | facts for each in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--block", type=int, default=128, choices=(64, 128))
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--density", type=float, nargs="+", default=[0.25, 0.1])
    parser.add_argument("--pattern", nargs="+", default=["local", "random"])
    parser.add_argument("--backends", nargs="+", choices=(*GPU_KERNELS, *CPU_KERNELS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cpu", action="store_true", help="the same as --device cpu")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    device = torch.device("cpu" if options.cpu else options.device)
    names = options.backends or (CPU_KERNELS if device.type == "cpu" else GPU_KERNELS)
    problem = Problem(
        options.heads, options.tokens, options.dim, options.block, DTYPES[options.dtype], device
    )
    masks = [(pattern, density) for density in options.density for pattern in options.pattern]
    with torch.inference_mode():
        if options.tune:
            rows = tune(problem, *masks[0])
        else:
            rows = run(problem, checked(problem, list(names)), masks)
    report(rows, machine(device), options.csv)


if __name__ == "__main__":
    main()
