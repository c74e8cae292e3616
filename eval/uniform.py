"""The settings of single methods, the same in all layers, that a run of one mean density allows."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from vdit_sparse.call import Call
from vdit_sparse.eval.calibrate import calibrate
from vdit_sparse.eval.calibrators.paro import PAROSearch
from vdit_sparse.eval.calibrators.sparse_vdit import SparseVDiTSearch
from vdit_sparse.grid import Grid
from vdit_sparse.method import SparseAttention
from vdit_sparse.methods import (
    AdaSpaAttention,
    DraftAttention,
    PAROAttention,
    RettentionAttention,
    SparseVDiTAttention,
)

BLOCK = 64
DENSE_STEPS = (0, 1, 2, 3)
BANDS = (0.02, 0.1, 0.2, 0.35, 0.5)
# How far below the wanted density a setting may be that cannot be set finely.
SLACK = 0.03
# Regions of 16 x 4 tokens tile the bundled model's frames of 16 x 28.
POOL = (16, 4)

Candidates = Iterator[tuple[str, SparseAttention]]


def uniform(
    density: float, grid: Grid, steps: int, files: dict[float, dict[str, str]]
) -> Candidates:
    """Methods whose run of `steps` steps has at most this mean density, dense and search steps
    counted at 1, by name: each with 0 to 3 dense steps, and AdaSpa and Re-ttention with several
    `refresh` and what else moves them. files: calibrations by density of a sparse step and name of
    the method. Radial's masks cannot be as sparse as 0.25 on few frames, and it is left out."""
    yield from _adaspa(density, steps)
    yield from _rettention(density, grid, steps)
    for dense, share in sparse_shares(density, steps):
        yield "draft", DraftAttention(block=BLOCK, dense_steps=dense, density=share, pool=POOL)
        found = files.get(share, {})
        for name, kind in (("paro", PAROAttention), ("sparse-vdit", SparseVDiTAttention)):
            if name in found:
                yield name, kind(calibration=found[name], dense_steps=dense)


def sparse_shares(density: float, steps: int) -> list[tuple[int, float]]:
    """(dense steps, density of the others) of runs of this mean density, from 0.05 on."""
    pairs = [(n, round((density * steps - n) / (steps - n), 4)) for n in DENSE_STEPS if n < steps]
    return [(n, share) for n, share in pairs if share >= 0.05]


def calibrations(
    pipe, density: float, steps: int, prompts: Sequence[str], seeds, folder: Path, **settings
) -> dict[float, dict[str, str]]:
    """Calibrates PAROAttention and Sparse-vDiT for each of `sparse_shares`; files that are there
    are kept."""
    files = {}
    for _, share in sparse_shares(density, steps):
        searches = {
            "paro": PAROSearch(block=BLOCK, density=share),
            "sparse-vdit": SparseVDiTSearch(
                block=BLOCK, density=0.6 * share, target=share, cost="blocks"
            ),
        }
        files[share] = {}
        for name, search in searches.items():
            file = folder / f"{name}-{share}.safetensors"
            if not file.exists():
                calibrate(pipe, search, prompts, seeds, out=file, **settings)
            files[share][name] = str(file)
    return files


def _adaspa(density: float, steps: int) -> Candidates:
    for dense in DENSE_STEPS:
        left = steps - dense - 1  # after the search, which is dense
        share = (density * steps - dense - 1) / left if left > 0 else 0
        if not 0.02 <= share <= 2 / 3:
            continue
        for per in ("row", "head"):
            for refresh in ("once", (dense, dense + left // 2)):
                for adaptive in (True, False):
                    fields = {"per": per, "refresh": refresh, "head_adaptive": adaptive}
                    yield "adaspa", AdaSpaAttention(dense_steps=dense, density=share, **fields)


def _rettention(density: float, grid: Grid, steps: int) -> Candidates:
    call = Call(grid, 0, 1, 0, steps, {})
    q = torch.empty(1, 1, grid.tokens, 1)
    base = RettentionAttention(block=BLOCK)
    bands = {}
    for mask, band in product(("block", "tile"), BANDS):
        method = replace(base, mask=mask, density=band)
        bands[float(method.plan(q, q, call).mask.kept_share)] = method
    for dense in DENSE_STEPS:
        for refresh in ("once", *range(2, steps)):
            caches = 1 if refresh == "once" else math.ceil((steps - dense) / refresh)
            if refresh != "once" and caches == 1:
                continue
            for kept, method in bands.items():
                run = (dense + caches + (steps - dense - caches) * kept) / steps
                if density - SLACK <= run <= density + 1e-6:
                    for ramp in (0.0, 0.04):
                        fields = {"dense_steps": dense, "refresh": refresh, "ramp": ramp}
                        yield "rettention", replace(method, **fields)
