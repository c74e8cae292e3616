"""Runs prompts through a recorder and writes what it found into a calibration file."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Protocol

from torch import Tensor

import vdit_sparse
from vdit_sparse.calibration import CalibratedAttention, Calibration, save
from vdit_sparse.call import Origin
from vdit_sparse.eval.denoise import call_parameters, latents
from vdit_sparse.method import SparseAttention
from vdit_sparse.pipelines.report import Summary

PACKAGES = ("torch", "triton", "diffusers")

# (runs finished before this one, steps done in it, its steps)
OnStep = Callable[[int, int, int], None]


class Recorder(Protocol):
    """A `SparseAttention` that writes down what it sees; serves one search.

    One that must see all prompts more than once also has `passes`, how often, and `begin(number)`,
    called before each pass with its number from 0.
    """

    def result(self) -> dict[str, Tensor]:
        """What was found, as "<expert>.<name>", after all prompts."""


class Search(Protocol):
    """The options of a search: a frozen dataclass, `method` the class that reads what it finds.
    Its fields go into the file, `block` being one of them."""

    method: type[CalibratedAttention]

    def recorder(self) -> Recorder: ...


def calibrate(
    pipe,
    search: Search,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    out: str | Path,
    on_step: OnStep = lambda *_: None,
    **settings,
) -> Calibration:
    """Calibrates a method on a loaded pipeline: generates every prompt with every seed, without
    decoding, while the search's recorder stands in for attention, and saves what it found. A
    recorder with `passes` gets all of them so many times.

    prompts, seeds: at least one each; one run after the other, each from the noise of its seed.
    out: the file to write, `.safetensors`; a former one is replaced at the end, at once.
    on_step: called after each step; it counts the runs of all passes, `runs_of` of them.
    settings: the other arguments of the pipeline's call, the same in all runs: height, width,
        num_frames, num_inference_steps, guidance_scale, ...

    The method that the pipeline had is taken out, and stock attention is left behind, also after
    an error. Returns what was saved. Raises ValueError without prompts or seeds and for experts of
    different configurations, RuntimeError for NaN, and what the recorder raises.
    """
    samples = [(prompt, seed) for prompt in prompts for seed in seeds]
    if not samples:
        raise ValueError(
            f"A calibration needs at least one prompt and one seed, got {len(prompts)} prompts and "
            f"{len(seeds)} seeds."
        )
    origin, recorder = _origin(pipe), search.recorder()
    with _applied(pipe, recorder) as summary:
        for number, sample in enumerate(_runs(recorder, samples)):
            run_prompt(pipe, *sample, lambda *at, n=number: on_step(n, *at), **settings)
        facts = _facts(search, summary())
    facts.update(origin=origin, prompts=tuple(prompts), seeds=tuple(seeds))
    calibration = Calibration(path=str(out), tensors=recorder.result(), **facts)
    save(calibration)
    return calibration


def runs_of(search: Search, prompts: Sequence[str], seeds: Sequence[int]) -> int:
    """How many runs a calibration makes, in all passes of its recorder."""
    return _passes(search.recorder()) * len(prompts) * len(seeds)


def density_of(
    pipe,
    method: SparseAttention,
    prompt: str,
    seed: int,
    *,
    on_step: Callable[[int, int], None] = lambda *_: None,
    **settings,
) -> float:
    """Mean density over all self-attention calls of one run of a method, without decoding; stock
    attention is left behind."""
    with _applied(pipe, method) as summary:
        run_prompt(pipe, prompt, seed, on_step, **settings)
        return summary().density


def run_prompt(
    pipe, prompt: str, seed: int, on_step: Callable[[int, int], None], **settings
) -> None:
    """One run as far as its latents. on_step: called as (steps done, steps) after each step.
    Raises RuntimeError if the latents hold NaN."""

    def step_ended(pipe, step, timestep, tensors):
        on_step(step + 1, getattr(pipe, "num_timesteps", step + 1))
        return tensors

    if "callback_on_step_end" in call_parameters(pipe):
        settings["callback_on_step_end"] = step_ended
    if not latents(pipe, {**settings, "prompt": prompt, "seed": seed}).isfinite().all():
        raise RuntimeError(
            f"The latents of {prompt!r} hold NaN; load the model in bf16 or fp32 in place of fp16."
        )


def _passes(recorder: Recorder) -> int:
    return getattr(recorder, "passes", 1)


def _runs(recorder: Recorder, samples: list[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """The samples of one pass after the other; the recorder is told where one begins."""
    passes = _passes(recorder)
    for number in range(passes):
        if passes > 1:
            recorder.begin(number)
        yield from samples


@contextmanager
def _applied(pipe, method: SparseAttention) -> Iterator[Callable[[], Summary]]:
    """A method in the pipeline, and out again; gives what says what the last run did."""
    from vdit_sparse.pipelines.attach import apply, remove, summary

    apply(pipe, method)
    try:
        yield lambda: summary(pipe)
    finally:
        remove(pipe)


def _facts(search: Search, ran: Summary) -> dict:
    """What a file says of its search and runs."""
    return {
        "method": search.method.__name__,
        "fields": asdict(search),
        "grid": replace(ran.grid, text=0),
        "layers": ran.layers,
        "steps": ran.steps,
        "versions": _versions(),
    }


def _origin(pipe) -> Origin:
    """The origin of the pipeline's experts, which must have the same configuration: a file has one
    for all. The folder of calibrations is of this machine only, and left out."""
    from vdit_sparse.pipelines.attach import origin_of
    from vdit_sparse.pipelines.families import DENOISERS

    models = {name: getattr(pipe, name, None) for name in DENOISERS}
    origins = [origin_of(pipe, name, model) for name, model in models.items() if model is not None]
    if len({origin.config for origin in origins}) > 1:
        raise ValueError(
            "The experts of this pipeline differ in their configurations, of which a calibration "
            "file holds one: "
            + ", ".join(f"{origin.expert} {origin.config}" for origin in origins)
            + ". Calibrate pipelines with one expert each."
        )
    return replace(origins[0], calibrations="")


def _versions() -> dict[str, str | None]:
    found = {package: _version(package) for package in PACKAGES}
    return {"vdit_sparse": vdit_sparse.__version__, **found}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
