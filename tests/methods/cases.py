"""Every method ready to be called: with a calibration where it needs one, and no dense steps."""

import torch

from vdit_sparse.calibration import Calibration
from vdit_sparse.call import Call, Origin
from vdit_sparse.methods import METHODS
from vdit_sparse.methods.paro import pack

# Fields with which a method's first sparse call already runs its plan.
READY = {
    "adaspa": {"dense_search": False},
    "rettention": {"density": 0.3, "mask": "tile"},
}
# The fields that make a method keep everything, for those whose fields say it.
EVERYTHING_KEPT = {
    "radial": {"decay": 1e9, "decimate": False},
    "adaspa": {"density": 1.0, "head_adaptive": False},
    "draft": {"density": 1.0},
    "rettention": {"density": 1.0},
}
CALIBRATED = ("sparse-vdit", "paro")


def ready(name: str, **fields):
    """The method with fields that let every step be sparse."""
    return METHODS[name](**{"dense_steps": 0, **READY.get(name, {}), **fields})


def call_at(name, grid, block=64, step=0, *, everything=False, heads=2, branch=None):
    """A call of a run of its own, with the calibration that the method may need."""
    memory = {}
    if name in CALIBRATED:
        memory["calibration"] = calibration(name, grid, block, heads, everything)
    return Call(grid, layer=0, layers=2, step=step, steps=4, memory=memory)


def calibration(name, grid, block, heads=2, everything=False) -> Calibration:
    """A calibration of 4 steps and 2 layers that keeps about a third, or all; seeded."""
    seeded = torch.Generator().manual_seed(1)
    fields = {"block": block, "density": 0.3, "stripes": "static", "every": 4, "sink_frames": 0}
    if name == "paro":
        nb = -(-grid.tokens // block)
        keep = torch.rand(1, 2, heads, nb, nb, generator=seeded) < (1 if everything else 0.3)
        order = torch.arange(1, heads + 1, dtype=torch.int8).expand(2, heads)
        bins = torch.zeros(4, dtype=torch.int16)
        found = {"order": order, "bin": bins, "keep": pack(keep)}
    else:
        modes = torch.arange(2, heads + 2, dtype=torch.int8) % 3 + 2
        found = {"modes": (modes * (not everything)).expand(4, 2, heads)}
    tensors = {f"transformer.{key}": value.contiguous() for key, value in found.items()}
    about = ("made up", METHODS[name].__name__, fields, Origin(), grid, 2, 4)
    return Calibration(*about, prompts=(), seeds=(), versions={}, tensors=tensors)
