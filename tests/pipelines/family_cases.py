"""Every method ready for a tiny pipeline of any family, calibrated where it needs that."""

from dataclasses import replace
from pathlib import Path

from tests.methods.cases import CALIBRATED, EVERYTHING_KEPT, READY
from tests.methods.cases import calibration as calibration_of
from vdit_sparse.calibration import save
from vdit_sparse.methods import METHODS
from vdit_sparse.pipelines.report import Summary

# Fields that drop blocks even of four frames of two blocks.
FEW_KEPT = {**READY, "radial": {"d1": "half", "sink_frames": 0}}


def method_for(name: str, run: Summary, heads: int, folder: Path, *, everything: bool = False):
    """A method of blocks of 64 whose every step is sparse, fit for a run like `run`; everything:
    with fields that keep all blocks."""
    fields = EVERYTHING_KEPT.get(name, {}) if everything else FEW_KEPT.get(name, {})
    if name not in CALIBRATED:
        return METHODS[name](**{"dense_steps": 0, "block": 64, **fields})
    found = calibration_of(name, run.grid, 64, heads, everything)
    tensors = dict(found.tensors)
    if name == "paro":
        one = tensors["transformer.keep"][:, :1]
        keep = one.expand(-1, run.layers, -1, -1)
        order = tensors["transformer.order"][:1].expand(run.layers, -1)
        tensors |= {"transformer.keep": keep, "transformer.order": order}
    else:
        tensors["transformer.modes"] = tensors["transformer.modes"][:, :1].expand(
            -1, run.layers, -1
        )
    tensors |= {key.replace("transformer", "transformer_2"): x for key, x in tensors.items()}
    file = folder / f"{name}-{run.grid.tokens}-{everything}.safetensors"
    save(replace(found, path=str(file), layers=run.layers, tensors=tensors))
    return METHODS[name](dense_steps=0, calibration=str(file))
