"""What the processes of test_parallel.py do; each writes down what it found."""

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import ContextParallelConfig

from tests.pipelines.family_cases import method_for
from tests.tiny_models.catalogue import TINY
from tests.tiny_models.parts import Tiny
from vdit_sparse import (
    AdaSpaAttention,
    apply,
    cfg_parallel,
    context_parallel,
    context_parallel_plan,
    parallel_mesh,
    remove,
    summary,
)
from vdit_sparse.pipelines import parallel
from vdit_sparse.pipelines.attach import denoisers_of
from vdit_sparse.pipelines.families import family_of
from vdit_sparse.pipelines.ulysses import Exchange, LocalHeads

DENSE = AdaSpaAttention(dense_steps=10_000)
SPARSE = AdaSpaAttention(density=0.3, block=64, dense_steps=0, random_share=0.1)


def in_processes(cases: list[tuple], folder: Path, count: int = 2) -> list[dict]:
    """Runs the cases (name of a function here, its arguments) in `count` processes; what each
    process found by case, an exception as its text."""
    mp.spawn(_process, (count, cases, str(folder)), nprocs=count)
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def _process(rank: int, count: int, cases: list[tuple], folder: str) -> None:
    torch.set_num_threads(1)
    place = f"file://{folder}/meeting"
    wait = timedelta(seconds=60)
    dist.init_process_group("gloo", place, wait, rank=rank, world_size=count)
    found = {}
    with torch.no_grad():
        for case in cases:
            name, *arguments = case
            try:
                found[case] = globals()[name](*arguments)
            except Exception as error:
                found[case] = f"{type(error).__name__}: {error}"
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def exchange(parts: tuple[int, ...], heads: int, rows: int) -> bool:
    """Whether tokens arrive where they should, and come back."""
    group = dist.group.WORLD
    mine = Exchange(group, parts)
    whole = torch.randn(rows, sum(parts), heads, 4)
    dist.broadcast(whole, 0)
    own = [part.tensor_split(group.size(), 1)[group.rank()] for part in whole.split(parts, 1)]
    local, other = torch.cat(own, 1), torch.cat(own, 1) + 1
    expected = whole.tensor_split(group.size(), 2)[group.rank()]
    arrived, plus = mine.gather(local, other)
    right = torch.equal(arrived, expected) and torch.equal(plus, expected + 1)
    # As a kernel leaves it, heads outermost.
    moved = arrived.transpose(1, 2).contiguous().transpose(1, 2)
    right &= torch.equal(mine.scatter(moved, heads), local)
    keys = whole[:, :, 0, 0] > 0
    own_keys = torch.cat(
        [part.tensor_split(group.size(), 1)[group.rank()] for part in keys.split(parts, 1)], 1
    )
    right &= torch.equal(mine.mask(own_keys[:, None]), keys[:, None])
    share = LocalHeads(group, heads)
    right &= torch.equal(share.all(share.own(whole, 2), 2), whole)
    return bool(right and mine.mask(keys) is keys)


def wrong_length() -> None:
    Exchange(dist.group.WORLD, (8,)).gather(torch.zeros(1, 3, 2, 4))


def too_few_heads() -> None:
    Exchange(dist.group.WORLD, (8,)).heads(1)


def split(entry: str, methods: tuple[str, ...], changed: str = "", anything: bool = False) -> dict:
    """Of dense attention and of each method: the largest difference from one process, and in one
    process from dense attention; the density of this process's heads, and of all. changed: other
    arguments of the call, "batch"; anything: lengths that do not divide (the video's must here, for
    gloo gathers no unequal parts)."""
    tiny = TINY[entry]()
    call = {**tiny.call, **(getattr(tiny, changed) if changed else {})}
    stock = _run(tiny, call)
    apply(tiny.pipe, DENSE)
    heads = _heads(tiny)
    _run(tiny, call)
    done, folder = summary(tiny.pipe), Path(tempfile.mkdtemp())
    ready = {name: method_for(name, done, heads, folder) for name in methods}
    alone = {name: _with_density(tiny, call, method) for name, method in ready.items()}
    tiny = TINY[entry]()
    context_parallel(tiny.pipe, anything=anything)
    found = {"dense": (_apart(_run(tiny, call, DENSE), stock), 0.0, 1.0, 1.0)}
    for name, method in ready.items():
        (expected, whole), (out, density) = alone[name], _with_density(tiny, call, method)
        found[name] = _apart(out, expected), _apart(expected, stock), density, whole
    return found


def guided(entry: str) -> dict:
    """As `split`, with the branches in two processes, and the calls of this one: once with
    guidance, then without, then with it again."""
    tiny = TINY[entry]()
    off = {**tiny.call, "guidance_scale": 1.0, "true_cfg_scale": 1.0}
    off = {name: value for name, value in off.items() if name in tiny.call}
    calls = [tiny.call, off, tiny.call]
    alone = [_run(tiny, call, SPARSE) for call in calls]
    before = summary(tiny.pipe).calls
    tiny = TINY[entry]()
    cfg_parallel(tiny.pipe)
    shared = [_run(tiny, call, SPARSE) for call in calls]
    return {
        "apart": max(map(_apart, shared, alone)),
        "guidance": _apart(alone[0], alone[1]),
        "calls": (summary(tiny.pipe).calls, before),
    }


def mesh_of_two() -> None:
    parallel_mesh("cpu", 1)


def unnamed_branches() -> None:
    tiny = TINY["flux-kontext"]()
    cfg_parallel(tiny.pipe)
    _run(tiny, tiny.call)


def both_kinds(entry: str) -> float:
    """Guidance and tokens over four processes, the method before either."""
    tiny = TINY[entry]()
    alone = _run(tiny, tiny.call, SPARSE)
    tiny = TINY[entry]()
    apply(tiny.pipe, SPARSE)
    mesh = parallel_mesh("cpu", 2)
    cfg_parallel(tiny.pipe, mesh=mesh)
    context_parallel(tiny.pipe, mesh=mesh)
    return _apart(_run(tiny, tiny.call), alone)


def method_first() -> dict:
    """The method before the split, and taken out and replaced after it."""
    tiny = TINY["flux"]()
    stock, alone = _run(tiny, tiny.call), _run(tiny, tiny.call, SPARSE)
    tiny = TINY["flux"]()
    apply(tiny.pipe, SPARSE)
    context_parallel(tiny.pipe)
    found = {"after": _apart(_run(tiny, tiny.call), alone)}
    remove(tiny.pipe)
    found["stock again"] = _apart(_run(tiny, tiny.call), stock)
    found["applied again"] = _apart(_run(tiny, tiny.call, SPARSE), alone)
    return found


def split_by_hand() -> tuple[str, float]:
    """diffusers' own call after the method: the error, and the difference once it is applied
    again."""
    tiny = TINY["flux"]()
    alone = _run(tiny, tiny.call, SPARSE)
    model = tiny.pipe.transformer
    parallel._enable(model, ContextParallelConfig(ulysses_degree=2), context_parallel_plan(model))
    said = _error(lambda: _run(tiny, tiny.call))
    return said, _apart(_run(tiny, tiny.call, SPARSE), alone)


def ring() -> list[str]:
    """What is said to a method before the split, and after it."""
    before, after = TINY["wan"](), TINY["wan"]()
    for tiny in (before, after):
        if tiny is before:
            apply(tiny.pipe, SPARSE)
        model = tiny.pipe.transformer
        parallel._enable(model, ContextParallelConfig(ring_degree=2), model._cp_plan)
    return [
        _error(lambda: _run(before, before.call)),
        _error(lambda: apply(after.pipe, SPARSE)),
    ]


def odd_prompt() -> None:
    tiny = TINY["qwen-image"]()
    context_parallel(tiny.pipe)
    _run(tiny, tiny.call, DENSE)


def removed_without_stock() -> None:
    tiny = TINY["hunyuan-video"]()
    apply(tiny.pipe, SPARSE)
    context_parallel(tiny.pipe)
    remove(tiny.pipe)


def _run(tiny: Tiny, call: dict, method=None) -> torch.Tensor:
    if method is not None:
        apply(tiny.pipe, method)
    out = tiny.pipe(**call, generator=torch.Generator().manual_seed(0))[0]
    return torch.stack(list(out))


def _with_density(tiny: Tiny, call: dict, method) -> tuple[torch.Tensor, float]:
    return _run(tiny, call, method), summary(tiny.pipe).sparse_density


def _heads(tiny: Tiny) -> int:
    model = next(iter(denoisers_of(tiny.pipe).values()))
    return next(iter(family_of(model).layers(model).values())).heads


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def _error(do: Callable) -> str:
    try:
        do()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""
