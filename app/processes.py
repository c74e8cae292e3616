"""`vdit-sparse generate` under torchrun: every process makes the video, the first one shows it."""

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from vdit_sparse.app.options import PARALLELS, InputError
from vdit_sparse.app.request import Request


@contextmanager
def joined(request: Request) -> Iterator[tuple[Request, bool]]:
    """Joins the processes that torchrun started, if it did: this process's request, and whether it
    is the one whose results are shown. The others write theirs into a folder that is thrown away.

    Each takes the GPU of its number, or the CPU with `--device cpu`. Raises InputError for what
    several processes cannot do.
    """
    if not dist.is_torchelastic_launched():
        if request.parallel != PARALLELS[0]:
            raise InputError(
                f"--parallel {request.parallel} needs several processes: run `torchrun "
                "--nproc-per-node 2 --no-python vdit-sparse generate ...`."
            )
        yield request, True
        return
    _check(request)
    on_cpu = request.device == "cpu" or not torch.cuda.is_available()
    if not on_cpu:
        torch.cuda.set_device(dist.get_node_local_rank())
    dist.init_process_group("gloo" if on_cpu else "nccl")
    try:
        if dist.get_rank() == 0:
            yield request, True
            return
        with tempfile.TemporaryDirectory() as folder:
            yield dataclasses.replace(request, out=Path(folder)), False
    finally:
        dist.destroy_process_group()


def processes() -> int:
    """How many processes make the video."""
    return dist.get_world_size() if dist.is_initialized() else 1


def spread(pipe, request: Request) -> None:
    """Spreads a loaded pipeline over the processes, as the request says; alone, does nothing.

    Raises InputError for a model, or a number of processes, that cannot be spread so.
    """
    if not dist.is_initialized():
        return
    from vdit_sparse.pipelines.parallel import cfg_parallel, context_parallel, parallel_mesh

    count = processes()
    if request.parallel != "tokens" and count % 2:
        raise InputError(
            f"--parallel {request.parallel} needs an even number of processes, got {count}."
        )
    device_type = "cpu" if dist.get_backend() == "gloo" else "cuda"
    try:
        mesh = parallel_mesh(device_type, count // 2) if request.parallel == "both" else None
        if request.parallel != "tokens":
            cfg_parallel(pipe, mesh=mesh)
        if request.parallel != "guidance":
            context_parallel(pipe, mesh=mesh, anything=True)
    except ValueError as error:
        raise InputError(f"--parallel {request.parallel}: {error}") from error


def _check(request: Request) -> None:
    if request.offload != "none":
        raise InputError(
            f"--offload {request.offload} does not go with several processes, each of which holds "
            "the whole model."
        )
    if request.device not in (None, "cpu", "cuda"):
        raise InputError(
            f"--device {request.device} is one device: under torchrun, leave it out, or name cpu."
        )
