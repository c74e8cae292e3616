"""How much faster several GPUs make a forward of a sparse transformer, and whether it stays equal.

    torchrun --nproc-per-node 2 -m vdit_sparse.eval.parallel_speed

Random weights and inputs of a published size: time depends on sizes and density alone. Every GPU
first runs whole forwards of its own, then its part of shared ones (`context_parallel`) of the same
weights, inputs and method. One GPU's time is the slowest one's; the others wait for it in shared
forwards too. Ends with 1 where the outputs differ by more than rounding.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from vdit_sparse.method import SparseAttention
from vdit_sparse.methods import DraftAttention, RadialAttention
from vdit_sparse.pipelines.attach import apply, summary
from vdit_sparse.pipelines.parallel import context_parallel
from vdit_sparse.pipelines.random_model import SIZES, random_inputs, random_transformer

# Radial's masks depend on the size alone; Draft plans from q and k, for each head.
METHODS: dict[str, SparseAttention] = {
    "radial": RadialAttention(decay=0.2, dense_steps=0),
    "draft": DraftAttention(density=0.25, dense_steps=0),
}
# Relative Frobenius difference: bf16 products of half as many rows are summed in another order.
BOUND = 1e-2


@dataclass(frozen=True, eq=False)
class Forward:
    """Forwards of one model with one method; seconds are those of the slowest process."""

    model: torch.nn.Module
    inputs: dict[str, Tensor]
    rounds: int

    def run(self) -> tuple[Tensor, float]:
        """The output, and the median seconds of a forward, after one that does not count."""
        out, seconds = self._once(), []
        for _ in range(self.rounds):
            self._wait()
            started = time.perf_counter()
            out = self._once()
            self._wait()
            seconds.append(time.perf_counter() - started)
        return out, statistics.median(seconds)

    def _once(self) -> Tensor:
        return self.model(**self.inputs, return_dict=False)[0]

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()


def measure(options: argparse.Namespace, device: torch.device) -> list[dict]:
    """A row for each method: seconds alone and together, their ratio, density, difference."""
    size = SIZES[options.model]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    model = random_transformer(size, options.layers, device, dtype)
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.data, 0)
    inputs = random_inputs(size, tuple(options.video), device, dtype)
    inputs["timestep"] = torch.full((1,), 500.0, device=device)
    forward = Forward(model, inputs, options.rounds)
    alone = {}
    for name in options.methods:
        apply(model, METHODS[name])
        alone[name] = forward.run()
    context_parallel(model)
    rows = []
    for name in options.methods:
        apply(model, METHODS[name])
        out, seconds = forward.run()
        expected, before = alone[name]
        apart = float((out.float() - expected.float()).norm() / expected.float().norm())
        rows.append(_row(name, model, before, seconds, apart))
    return rows


def _row(name: str, model: torch.nn.Module, before: float, seconds: float, apart: float) -> dict:
    done = summary(model)
    return {
        "method": name,
        "density": done.density,
        "backend": done.backend,
        "tokens": done.grid.tokens,
        "seconds_alone": before,
        "seconds_together": seconds,
        "ratio": before / seconds,
        "difference": apart,
    }


def main(words: list[str] | None = None) -> None:
    """Measures and writes JSON; the processes must be torchrun's."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=SIZES, default="wan2.1-14b")
    parser.add_argument("--layers", type=int, default=10, help="of the model's")
    parser.add_argument("--video", type=int, nargs=3, default=(720, 1280, 81), help="H W frames")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(words)
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", dist.get_node_local_rank()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    with torch.inference_mode():
        rows = measure(options, device)
    about = {
        "gpus": dist.get_world_size(),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "model": f"{options.model}, {options.layers} layers",
    }
    if dist.get_rank() == 0:
        sys.stdout.write(json.dumps({**about, "rows": rows}, indent=2) + "\n")
    dist.destroy_process_group()
    if max(row["difference"] for row in rows) > BOUND:
        sys.exit("The outputs differ by more than rounding.")


if __name__ == "__main__":
    main()
