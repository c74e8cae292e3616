"""What a method is applied to: the transformers of a pipeline, their origin and their schedule."""

import hashlib
import json
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, LTXEulerAncestralRFScheduler, ModularPipeline
from diffusers.guiders import BaseGuidance

from vdit_sparse.call import Origin
from vdit_sparse.pipelines.clock import Schedule
from vdit_sparse.pipelines.families import DENOISERS, family_of

CALIBRATIONS = "calibrations"  # folder of a checkpoint
# A modular pipeline's guiders, each of one of its `DENOISERS`.
GUIDERS = ("guider", "guider_2")

Target = DiffusionPipeline | ModularPipeline | torch.nn.Module


def denoisers_of(target: Target) -> dict[str, torch.nn.Module]:
    """The transformers of a pipeline, or the transformer itself, by name. Raises TypeError for
    anything else, and ValueError for a pipeline without one, or of no known family."""
    if isinstance(target, torch.nn.Module):
        family_of(target)
        return {"transformer": target}
    if not isinstance(target, DiffusionPipeline | ModularPipeline):
        raise TypeError(
            f"Expected a diffusers pipeline or transformer, got {type(target).__name__}."
        )
    named = {name: getattr(target, name, None) for name in DENOISERS}
    denoisers = {name: model for name, model in named.items() if model is not None}
    if not denoisers:
        raise ValueError(f"{type(target).__name__} has no transformer to attach to.")
    for model in denoisers.values():
        family_of(model)
    return denoisers


def origin_of(target: Target, expert: str, model: torch.nn.Module) -> Origin:
    """What calibrations need to know of a model: its name, configuration and scheduler, and the
    folder of those that came with it."""
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
    # A modular pipeline is told apart by where it came from, and has no such field.
    named = getattr(target, "_pretrained_model_name_or_path", None)
    source = str(named or getattr(target.config, "_name_or_path", "") or "")
    folder = Path(source) / CALIBRATIONS
    scheduler = getattr(target, "scheduler", None)
    return Origin(
        model=Path(source).name if Path(source).is_dir() else source,
        config=digest[:16],
        scheduler=type(scheduler).__name__ if scheduler is not None else "",
        expert=expert,
        calibrations=str(folder) if source and folder.is_dir() else "",
    )


def schedule_of(target: Target) -> Callable[[], Schedule]:
    """Reads the scheduler, and a modular pipeline's guiders, without keeping the pipeline alive."""
    if isinstance(target, torch.nn.Module):
        return Schedule
    pipeline = weakref.ref(target)
    counted = family_of(next(iter(denoisers_of(target).values()))).steps

    def schedule() -> Schedule:
        scheduler = getattr(pipeline(), "scheduler", None)
        timesteps, index, first = (
            getattr(scheduler, name, None) for name in ("timesteps", "step_index", "begin_index")
        )
        guiders = (getattr(pipeline(), name, None) for name in GUIDERS)
        guidance = {
            expert: _conditions(guider)
            for expert, guider in zip(DENOISERS, guiders, strict=True)
            if isinstance(guider, BaseGuidance)
        }
        steps = counted(pipeline()) if counted else None
        if isinstance(scheduler, LTXEulerAncestralRFScheduler) and timesteps is not None:
            steps = len(timesteps) - 1  # its pipelines leave out the last
        return Schedule(timesteps, index, first or 0, steps, guidance)

    return schedule


def _conditions(guider: BaseGuidance) -> str:
    """The calls that a guider makes in its present step: their number, and that all of them have
    the prompt, where the second call skips layers and does not leave the prompt out."""
    leaves_out = getattr(guider, "_is_cfg_enabled", lambda: True)()
    return f"{guider.num_conditions}" + ("" if leaves_out else ", prompt only")
