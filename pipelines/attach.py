"""`apply`, `remove` and `summary`: a method into a diffusers model, out again, and what it did."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import torch
from diffusers.hooks import HookRegistry
from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry

from vdit_sparse.method import SparseAttention
from vdit_sparse.pipelines.clock import Clock
from vdit_sparse.pipelines.families import Family, family_of, preset
from vdit_sparse.pipelines.hook import Run
from vdit_sparse.pipelines.offload import beneath_offload
from vdit_sparse.pipelines.processor import SparseAttnProcessor, skipped
from vdit_sparse.pipelines.report import Summary, settle
from vdit_sparse.pipelines.spot_check import SpotCheck
from vdit_sparse.pipelines.target import Target, denoisers_of, origin_of, schedule_of
from vdit_sparse.pipelines.ulysses import check_split, has_no_stock_split, is_outermost

HOOK = "vdit_sparse"


def apply(
    target: Target,
    method: SparseAttention | str,
    *,
    timed: bool = False,
    check: bool = False,
    strict: bool = False,
) -> None:
    """Runs the self-attention of a pipeline or transformer through a method.

    target: a diffusers pipeline (all its denoisers, so both experts of Wan 2.2), a modular one, or
        a transformer.
        On a bare transformer the number of steps is unknown unless the caller's `cache_context`
        gives it.
    method: a method or the name of one of the family's presets.
    timed: record the milliseconds of every attention call for `summary`.
    check: compare a few rows of the first sparse call of each layer in a run with exact attention,
        and warn (`AttentionWarning`) where they are not finite or far off (`SpotCheck`);
        `summary` has the errors.
    strict: raise RuntimeError instead; implies `check`.

    Applying again replaces the method and needs no recompilation. Cross-attention stays as it is.
    Raises ValueError for a model or preset that is not known, naming those that are, for a method
    that cannot run on the model, and for a layer whose processor is not the stock one.
    """
    denoisers = denoisers_of(target)
    methods = {
        name: preset(model, method) if isinstance(method, str) else method
        for name, model in denoisers.items()
    }
    for name, model in denoisers.items():
        _check(model, methods[name])
    clock = Clock(schedule_of(target))
    for name, model in denoisers.items():
        run = _installed(name, model)
        run.clock = clock
        look = SpotCheck(strict) if check or strict else None
        run.use(methods[name], origin_of(target, name, model), timed, look)


def remove(target: Target) -> None:
    """Gives every layer its former processor back and takes the hook out; nothing happens to a
    model without one. Raises RuntimeError where the stock attention would then be wrong, because
    the tokens are split over GPUs by a plan of ours."""
    for model in denoisers_of(target).values():
        run = _run_of(model)
        if run is None:
            continue
        if has_no_stock_split(model):
            raise RuntimeError(
                f"The tokens of {type(model).__name__} are split over GPUs, where its stock "
                "attention cannot run: load it anew, or let a method's dense_steps be all steps."
            )
        _uninstall(model, run)


def summary(target: Target) -> Summary:
    """What the last run did, layer by layer and step by step. Waits for the device."""
    runs = _runs(target)
    if not runs:
        return Summary(method="none: stock attention")
    methods = list(dict.fromkeys(str(run.method) for run in runs))
    latest = max(run.clock.run for run in runs)
    entries = [settle(entry) for run in runs if run.clock_run == latest for entry in run.entries]
    backend, reasons = next((run.backend for run in runs if run.backend), (None, {}))
    clock = runs[0].clock
    return Summary(
        method=" / ".join(methods),
        entries=tuple(entries),
        backend=backend,
        reasons=reasons,
        grid=clock.grid,
        layers=len(runs[0].processors),
        steps=clock.steps,
        calibration=next((run.calibration for run in runs if run.calibration), None),
    )


class SparsePipelineMixin:
    """Gives a diffusers pipeline class `set_attn_processor`, and a checkpoint's default arguments.

    generation: arguments of `__call__` that this checkpoint wants where the caller gives none
        (size, steps, guidance), and the `fps` of its videos.
    """

    generation: Mapping[str, object] = MappingProxyType({})

    def __call__(self, *args, **kwargs):
        given = self.stock_signature.bind_partial(*args, **kwargs).arguments
        own = {name: value for name, value in self.generation.items() if name != "fps"}
        try:
            return super().__call__(**{**own, **given})
        finally:
            # diffusers resets only models that know caches, and none after an exception.
            for run in _runs(self):
                run.reset_state(None)

    @property
    def stock_signature(self) -> inspect.Signature:
        """The signature of the diffusers pipeline's own `__call__`."""
        return inspect.signature(super().__call__)

    def set_attn_processor(self, processor) -> None:
        """Sets how self-attention runs: a `SparseAttention` method, the name of a preset, or an
        ordinary diffusers processor (which takes ours out). Cross-attention stays as it is."""
        if isinstance(processor, (SparseAttention, str)):
            apply(self, processor)
            return
        remove(self)
        for model in denoisers_of(self).values():
            for module in family_of(model).layers(model).values():
                _set_processor(module, processor)


def _run_of(model: torch.nn.Module) -> Run | None:
    return HookRegistry.check_if_exists_or_initialize(model).get_hook(HOOK)


def _check(model: torch.nn.Module, method: object) -> None:
    if not isinstance(method, SparseAttention):
        raise TypeError(
            f"Expected a sparse attention method or a preset's name, got {type(method).__name__}."
        )
    family = family_of(model)
    reason = family.refuses(model, method) if family.refuses else None
    if reason:
        raise ValueError(f"{type(method).__name__} cannot run on {type(model).__name__}: {reason}.")
    check_split(model, family)
    for path, module in family.layers(model).items():
        if not isinstance(module.processor, SparseAttnProcessor):
            _ours(family, path, module.processor)


def _runs(target: Target) -> list[Run]:
    return [run for model in denoisers_of(target).values() if (run := _run_of(model)) is not None]


@contextmanager
def outermost(model: torch.nn.Module) -> Iterator[None]:
    """Keeps our hooks the first to see a transformer's arguments: those that are registered
    meanwhile come after them."""
    registry = HookRegistry.check_if_exists_or_initialize(model)
    ours = {name: hook for name, hook in registry.hooks.items() if name.startswith(HOOK)}
    for name in reversed(ours):
        registry.remove_hook(name, recurse=False)
    try:
        yield
    finally:
        for name, hook in ours.items():
            registry.register_hook(hook, name)
        registry.invalidate_child_registries_cache()


def _uninstall(model: torch.nn.Module, run: Run) -> None:
    for path, module in run.layers.items():
        ours = module.processor
        if isinstance(ours, SparseAttnProcessor) and ours.run == run.number:
            former = run.replaced[path]
            for name in ("_attention_backend", "_parallel_config"):
                if hasattr(former, name):
                    setattr(former, name, getattr(ours, name))
            _set_processor(module, former)
    registry = HookRegistry.check_if_exists_or_initialize(model)
    with beneath_offload(model):
        registry.remove_hook(HOOK, recurse=False)
    registry.invalidate_child_registries_cache()


def _installed(name: str, model: torch.nn.Module) -> Run:
    run = _run_of(model)
    if run is not None and (run.lost() or not is_outermost(run, model)):
        _uninstall(model, run)
        run = None
    return run or _install(name, model)


def _install(name: str, model: torch.nn.Module) -> Run:
    family = family_of(model)
    run = Run(name, family, Clock())
    layers = run.layers = family.layers(model)
    for layer, (path, module) in enumerate(layers.items()):
        former = run.replaced[path] = module.processor
        ours = _ours(family, path, former)(run.number, layer)
        ours._attention_backend = getattr(former, "_attention_backend", None)
        ours._parallel_config = getattr(former, "_parallel_config", None)
        run.processors.append(ours)
    for module, ours in zip(layers.values(), run.processors, strict=True):
        _set_processor(module, ours)
        # Guiders that skip layers ask what a skipped processor returns.
        AttentionProcessorRegistry.register(type(ours), AttentionProcessorMetadata(skipped))
    registry = HookRegistry.check_if_exists_or_initialize(model)
    with beneath_offload(model):
        registry.register_hook(run, HOOK)
    registry.invalidate_child_registries_cache()
    return run


def _ours(family: Family, path: str, former: object) -> type[SparseAttnProcessor]:
    """Our class in place of a stock processor."""
    if type(former) not in family.processors:
        stock = ", ".join(kind.__name__ for kind in family.processors)
        raise ValueError(
            f"{path} has a {type(former).__name__}, which would be lost: sparse attention takes "
            f"the place of {stock}. Unload the adapter, or set the stock processor first."
        )
    return family.processors[type(former)]


def _set_processor(module: torch.nn.Module, processor: object) -> None:
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:  # Mochi's
        module.processor = processor
