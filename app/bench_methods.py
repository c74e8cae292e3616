"""The methods as benchmarks run them: all sparse, near one density, with random calibrations."""

from collections.abc import Container, Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from vdit_sparse.calibration import CalibratedAttention, Calibration, save
from vdit_sparse.eval.speed import methods, random_calibration
from vdit_sparse.grid import Grid
from vdit_sparse.method import SparseAttention


def sparse_methods(
    names: Container[str],
    grid: Grid,
    heads: int,
    density: float,
    block: int,
    layers: int,
    folder: Path,
) -> Iterator[tuple[str, SparseAttention]]:
    """Those of `names` near the density, without dense steps or layers. Calibrated ones get a
    random calibration for `layers` layers in `folder`, which has to live as long as they do."""
    for name, method in methods(density, block):
        if name not in names:
            continue
        method = replace(
            method, dense_steps=0, last_dense_steps=0, dense_layers=0, last_dense_layers=0
        )
        if isinstance(method.refresh, tuple):
            # Listed steps may be fractions of a number that a bare transformer does not know.
            method = replace(method, refresh="once")
        if isinstance(method, CalibratedAttention):
            about = (name, grid, heads, density, block, layers, folder)
            method = replace(method, calibration=calibration_file(*about))
        yield name, method


def calibration_file(
    name: str, grid: Grid, heads: int, density: float, block: int, layers: int, folder: Path
) -> str:
    """A random calibration of a method in a file, the same for all layers."""
    one: Calibration = random_calibration(name, grid, heads, density, block)
    tensors = {key: _for_layers(key, tensor, layers) for key, tensor in one.tensors.items()}
    path = str(folder / f"{name}-{density}.safetensors")
    save(replace(one, path=path, layers=layers, tensors=tensors))
    return path


def _for_layers(name: str, tensor: Tensor, layers: int) -> Tensor:
    """The axis of layers is the first of an order, and the second of what has one of steps too."""
    if name.endswith(".order"):
        return tensor.expand(layers, -1)
    if tensor.ndim == 1:
        return tensor
    return tensor.expand(tensor.shape[0], layers, *tensor.shape[2:])
