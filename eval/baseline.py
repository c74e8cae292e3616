"""The fastest exact dense attention of this machine: what sparse attention has to beat."""

import time
from dataclasses import dataclass

import torch

from vdit_sparse.eval.denoise import execution_device, latents, use
from vdit_sparse.pipelines.families import DENOISERS

# diffusers' names. SageAttention is not among them: it quantises, so it is another method.
CANDIDATES = ("native", "_native_cudnn", "_native_flash", "flash", "_flash_3", "xformers")
ROUNDS = 2


@dataclass(frozen=True)
class Baseline:
    """backend: diffusers' name of the fastest; seconds: of each that ran, for one step of each
    transformer; reasons: why the others did not."""

    backend: str
    seconds: dict[str, float]
    reasons: dict[str, str]


def find_baseline(pipe, inputs: dict) -> Baseline:
    """Times the candidates on the pipeline's own call, at full size, after a first one that does
    not count, and leaves the fastest set. A CPU has one candidate, which is not timed.

    inputs: as in `eval.denoise.run`.
    """
    if execution_device(pipe).type == "cpu":
        return Baseline("native", {}, dict.fromkeys(CANDIDATES[1:], "the device is a CPU"))
    use(pipe, None)
    short = {**inputs, "num_inference_steps": len(_models(pipe))}
    seconds, reasons = {}, {}
    for name in CANDIDATES:
        try:
            set_backend(pipe, name)
            seconds[name] = min([_seconds(pipe, short) for _ in range(1 + ROUNDS)][1:])
        except (ImportError, RuntimeError, ValueError, NotImplementedError) as error:
            reasons[name] = " ".join(str(error).split())[:200]
    if not seconds:
        raise RuntimeError(f"No dense attention runs on this machine: {reasons}.")
    best = min(seconds, key=seconds.get)
    set_backend(pipe, best)
    return Baseline(best, seconds, reasons)


def set_backend(pipe, name: str) -> None:
    """Dense and cross-attention of all transformers by a backend of diffusers."""
    for model in _models(pipe):
        model.set_attention_backend(name)


def _models(pipe) -> list[torch.nn.Module]:
    return [model for name in DENOISERS if (model := getattr(pipe, name, None)) is not None]


def _seconds(pipe, inputs: dict) -> float:
    started = time.perf_counter()
    # Copying the latents waits for the device.
    latents(pipe, inputs).cpu()
    return time.perf_counter() - started
