"""`context_parallel` and `cfg_parallel`: one video on several GPUs."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, ParallelConfig
from diffusers.hooks import HookRegistry
from diffusers.hooks.context_parallel import apply_context_parallel
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from vdit_sparse.pipelines.attach import Target, denoisers_of, outermost
from vdit_sparse.pipelines.branches import Branches
from vdit_sparse.pipelines.families import Parallel, family_of

HOOK = "vdit_sparse_branches"


def context_parallel(
    target: Target,
    degree: int | None = None,
    *,
    anything: bool = False,
    mesh: DeviceMesh | None = None,
) -> None:
    """Splits the tokens of a pipeline's transformers over processes (Ulysses, arXiv 2309.14509):
    each has all weights and a part of the tokens, and in self-attention all tokens and a part of
    the heads, for which methods plan.

    It calls diffusers' `enable_parallelism(config=ContextParallelConfig(ulysses_degree=degree))`
    with `context_parallel_plan`'s plan; a method may be applied before or after. Cross-attention,
    whose queries are split and whose keys are not, then needs no exchange and does none. Every
    process makes the same calls with the same seeds, and gets the whole output.

    target: a diffusers pipeline (all its transformers) or a transformer, on this process's device,
        after `torch.distributed.init_process_group`.
    degree: how many processes share a video, at most one for each head; default all, or those of
        the mesh.
    anything: allow sequences that `degree` does not divide (diffusers' `ulysses_anything`).
    mesh: a device mesh with the dimensions "ring" (of 1) and "ulysses", where there are others too,
        as in `parallel_mesh`.

    Raises ValueError for a family whose tokens cannot be split, and RuntimeError without processes
    or where the model is split already.
    """
    _need_processes("context_parallel")
    if degree is None:
        degree = dist.get_world_size() if mesh is None else mesh["ulysses"].size()
    models = denoisers_of(target).values()
    plans = [context_parallel_plan(model) for model in models]
    for model, plan in zip(models, plans, strict=True):
        config = ContextParallelConfig(ulysses_degree=degree, ulysses_anything=anything, mesh=mesh)
        with outermost(model):
            _enable(model, config, plan)
        _leave_whole(model, family_of(model).parallel)


def context_parallel_plan(transformer: torch.nn.Module) -> Mapping:
    """The `cp_plan` for diffusers' `enable_parallelism`: ours, or else the class's own.

    Raises ValueError for a transformer whose tokens cannot be split.
    """
    parallel, name = family_of(transformer).parallel, type(transformer).__name__
    if parallel is None:
        raise ValueError(
            f"The tokens of {name} cannot be split over GPUs: neither diffusers nor vdit_sparse "
            "has a plan for it. cfg_parallel runs its guidance branches on two."
        )
    reason = parallel.refuses(transformer)
    if reason:
        raise ValueError(f"The tokens of this {name} cannot be split over GPUs: {reason}.")
    return parallel.plan(transformer) if parallel.plan else transformer._cp_plan


def cfg_parallel(target: Target, *, mesh: DeviceMesh | None = None) -> None:
    """Lets two processes share the branches of classifier-free guidance (`Branches`): each has all
    weights, and computes one branch of every step but a run's first. Every process makes the same
    calls with the same seeds, and gets both branches. `summary` tells of this process's calls.

    A method may be applied before or after; its plans and caches are a branch's own anyway. Where
    guidance is off, and one branch is all there is, both processes compute it.

    target: a diffusers pipeline (all its transformers) or a transformer, on this process's device,
        after `torch.distributed.init_process_group`.
    mesh: None for two processes, or a device mesh of which the dimension "cfg" has two, as
        `parallel_mesh` makes for both kinds of parallelism at once.

    Raises RuntimeError without processes, and ValueError for any other number than two.
    """
    _need_processes("cfg_parallel")
    group = mesh["cfg"].get_group() if mesh is not None else dist.group.WORLD
    if group.size() != 2:
        raise ValueError(
            f"cfg_parallel shares two branches between two processes, got {group.size()}: use "
            "parallel_mesh, and context_parallel for the others."
        )
    for model in denoisers_of(target).values():
        with outermost(model):
            registry = HookRegistry.check_if_exists_or_initialize(model)
            registry.register_hook(Branches(family_of(model), group), HOOK)


def parallel_mesh(device_type: str, degree: int) -> DeviceMesh:
    """A device mesh of two guidance branches times `degree` parts of the tokens, for `cfg_parallel`
    and `context_parallel`; processes of one branch are neighbours. device_type: "cuda" or "cpu".
    Raises RuntimeError without processes, and ValueError for a degree below 2."""
    _need_processes("parallel_mesh")
    if degree < 2:
        raise ValueError(
            "guidance and tokens together take 2 times at least 2 processes, got 2 times "
            f"{degree}: start 4, or share one of both alone (cfg_parallel or context_parallel)."
        )
    return init_device_mesh(device_type, (2, 1, degree), mesh_dim_names=("cfg", "ring", "ulysses"))


def _need_processes(name: str) -> None:
    if not dist.is_initialized():
        raise RuntimeError(
            f"{name} needs several processes: run under torchrun, and call "
            "torch.distributed.init_process_group() first."
        )


def _enable(model: torch.nn.Module, config: ContextParallelConfig, plan: Mapping) -> None:
    if dist.get_backend() != "gloo":
        model.enable_parallelism(config=config, cp_plan=plan)
        return
    # What it does, but that it takes the rank modulo the number of accelerators.
    if model._parallel_config is not None:
        raise RuntimeError(f"{type(model).__name__} is split over processes already.")
    mesh = config.mesh or init_device_mesh(
        "cpu", config.mesh_shape, mesh_dim_names=config.mesh_dim_names
    )
    whole = ParallelConfig(context_parallel_config=config)
    whole.setup(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), mesh=mesh)
    model._parallel_config = whole
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = whole
    apply_context_parallel(model, config, plan)


def _leave_whole(model: torch.nn.Module, parallel: Parallel) -> None:
    """Attention that finds all its keys in its process exchanges nothing."""
    ours = set(family_of(model).layers(model))
    for path, module in model.named_modules():
        processor = getattr(module, "processor", None)
        exchanges = path in ours or path.endswith(parallel.exchanging)
        if hasattr(processor, "_parallel_config") and not exchanges:
            processor._parallel_config = None
