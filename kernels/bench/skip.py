"""What `skip_threshold` gains: times and errors where more and more tiles have small weights."""

from functools import partial

import torch
from torch import Tensor

from vdit_sparse.kernels.bench.measure import time_gpu
from vdit_sparse.kernels.bench.problem import Problem
from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.block_sparse import block_sparse_attention, skipping_attention

SCENES = 16
APART = (0.0, 0.7, 1.0, 1.4)
THRESHOLDS = (1e-4, 1e-2)
BACKENDS = ("hopper", "triton")


def in_scenes(x: Tensor, apart: float) -> Tensor:
    """x `[B, H, S, D]` plus `apart` times a random direction for each sixteenth of the tokens, the
    same for queries and keys: scores within a scene are larger by apart^2 sqrt(D)."""
    made = torch.Generator(x.device).manual_seed(1)
    scenes = torch.randn(SCENES, x.shape[-1], generator=made, device=x.device)
    scene = torch.arange(x.shape[2], device=x.device) * SCENES // x.shape[2]
    return x + (apart * scenes[scene]).to(x.dtype)


def run_skips(problem: Problem, density: float) -> None:
    """Prints, for tokens in scenes ever farther apart, a line for each backend and threshold: the
    time, the blocks left out, and how far the output is from the one that leaves out none. Random
    lists of this density. A line that fails says why."""
    q, k, v = problem.tensors()
    mask = problem.mask("random", density)
    for apart in APART:
        tensors = in_scenes(q, apart), in_scenes(k, apart), v
        for backend in BACKENDS:
            try:
                _compare(apart, tensors, mask, backend)
            # A compiler or a driver may raise anything; the other lines still count.
            except Exception as failed:
                print(f"{backend}: {type(failed).__name__}: {' '.join(str(failed).split())[:160]}")


def _compare(apart: float, tensors: tuple[Tensor, ...], mask: BlockMask, backend: str) -> None:
    whole = partial(block_sparse_attention, *tensors, mask, backend=backend)
    expected, before = whole()[0].float(), time_gpu(whole)
    print(f"{backend:7} scenes {apart:g} apart: {before:8.3f} ms without a threshold", flush=True)
    kept = mask.keep().expand(1, tensors[0].shape[1], -1, -1)
    for threshold in THRESHOLDS:
        call = partial(skipping_attention, *tensors, mask, threshold, backend=backend)
        out, _, skipped = call()
        error = float((out.float() - expected).norm() / expected.norm())
        share = float(skipped.sum() / kept.sum())
        ms = time_gpu(call)
        print(
            f"{'':7} threshold {threshold:g}: {ms:8.3f} ms, {before / ms:.2f}x, {share:6.1%} of "
            f"the listed blocks left out, relative difference {error:.1e}",
            flush=True,
        )
