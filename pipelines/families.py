"""Which model families there are, and what each one must say about itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module

import torch

from vdit_sparse.grid import Grid
from vdit_sparse.method import SparseAttention

# Transformer class -> module that holds its `FAMILY`; imported on demand.
FAMILIES = {
    "WanTransformer3DModel": "vdit_sparse.pipelines.wan",
}

# Components of a pipeline that hold a transformer; Wan 2.2 has one for each noise range.
DENOISERS = ("transformer", "transformer_2")


@dataclass(frozen=True)
class Family:
    """One model family's side of the contract with `attach`.

    processor: class of the sparse processors, made as `processor(run, layer)`.
    layers: transformer -> its visual self-attention modules by name, in execution order.
    grid: (transformer, arguments of its forward by name) -> Grid of this call.
    presets: settings published for, or measured on, this family's checkpoints.
    """

    processor: type
    layers: Callable[[torch.nn.Module], dict[str, torch.nn.Module]]
    grid: Callable[[torch.nn.Module, Mapping[str, object]], Grid]
    presets: Mapping[str, SparseAttention] = field(default_factory=dict)


def family_of(transformer: torch.nn.Module) -> Family:
    """The family of a diffusers transformer. Raises ValueError, naming the supported classes, if
    there is none."""
    for kind in type(transformer).__mro__:
        if kind.__name__ in FAMILIES:
            return import_module(FAMILIES[kind.__name__]).FAMILY
    raise ValueError(
        f"No sparse attention for {type(transformer).__name__}; there is for: "
        f"{', '.join(sorted(FAMILIES))}."
    )


def preset(transformer: torch.nn.Module, name: str) -> SparseAttention:
    """The named preset of the transformer's family. Raises ValueError with the names there are."""
    presets = family_of(transformer).presets
    if name not in presets:
        raise ValueError(
            f"Unknown preset {name!r} for {type(transformer).__name__}; there are: "
            f"{', '.join(sorted(presets))}."
        )
    return presets[name]
