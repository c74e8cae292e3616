"""One run of a loaded pipeline: its frames, seconds, memory, and what its attention did.

An image is a video of one frame.
"""

import dataclasses
import inspect
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from vdit_sparse.calibration import CalibrationWarning
from vdit_sparse.method import SparseAttention
from vdit_sparse.pipelines.families import DENOISERS

OnStep = Callable[[int, int], None]
# Arguments that a call has which makes videos.
FRAMES = {"num_frames", "video"}


@dataclass(frozen=True, eq=False)
class Clip:
    """What one run gave.

    frames: uint8 `[T, 3, H, W]`, on the CPU, as they came from the decoder, before any codec.
    latents: fp32, on the CPU, what the last step left, as the pipeline has it (`[C, T, H, W]`, or
        packed into tokens); None where it does not hand them out after each step.
    denoise_seconds: from the first call of the transformer to the end of the last step.
    decode_seconds: the rest; None where the pipeline does not say when its last step ended.
    density: mean share of key blocks over all self-attention calls; sparse_density: over the sparse
        ones, None if there were none. backend, reasons, error: as in `Summary`.
    peak_memory_bytes: highest in the run; on CUDA what torch allocated, else of the whole process.
    """

    frames: Tensor
    denoise_seconds: float
    decode_seconds: float | None
    peak_memory_bytes: int
    density: float
    sparse_density: float | None = None
    attention_calls: int | None = None
    error: float | None = None
    latents: Tensor | None = None
    backend: str | None = None
    reasons: dict[str, str | None] = field(default_factory=dict)


def use(pipe, method: SparseAttention | None, check: str = "off") -> None:
    """Puts a method into the pipeline; None is diffusers' own attention, with nothing of ours.

    check: "warn" or "strict" compares each layer's first sparse call with exact attention, and
        warns or raises where it is far off (`attach.apply`).
    """
    from vdit_sparse.pipelines.attach import apply, remove

    if method is None:
        remove(pipe)
    else:
        apply(pipe, method, check=check != "off", strict=check == "strict")


def run(
    pipe, method: SparseAttention | None, inputs: dict, on_step: OnStep, check: str = "off"
) -> Clip:
    """Runs the pipeline once with a method, None for stock attention.

    inputs: arguments of its call without generator and callbacks, plus `seed`: every run of the
        same seed starts from the same noise, whatever the device.
    on_step: called as (steps done, steps) after each step.
    check: as in `use`; the looks are in the seconds, one a layer.

    Raises RuntimeError if the frames hold NaN.
    """
    use(pipe, method, check)
    device = execution_device(pipe)
    _forget_peak(device)
    frames, clock = timed_call(pipe, inputs, on_step)
    return Clip(
        frames=frames[0],
        latents=None if clock.latents is None else clock.latents[0].float().cpu(),
        denoise_seconds=clock.denoise_seconds,
        decode_seconds=clock.decode_seconds,
        peak_memory_bytes=_peak(device),
        **_attention(pipe, method),
    )


def warm_up(pipe, method: SparseAttention | None, inputs: dict) -> int:
    """Runs a few steps that nobody times, so that kernels are compiled, and returns their number.

    Each expert gets a step; where a method has dense and sparse steps, one of each.
    """
    experts = sum(getattr(pipe, name, None) is not None for name in DENOISERS)
    rounds = [method]
    if method is not None:
        sparse = dataclasses.replace(method, dense_steps=0, last_dense_steps=0)
        rounds = [sparse]
        if sparse != method:
            rounds.append(dataclasses.replace(sparse, dense_steps=experts))
    short = {**inputs, "num_inference_steps": experts}
    with warnings.catch_warnings():
        # The number of steps is not the one that a calibration was made for: on purpose.
        warnings.simplefilter("ignore", CalibrationWarning)
        for each in rounds:
            use(pipe, each)
            latents(pipe, short)
    return experts * len(rounds)


def latents(pipe, inputs: dict) -> Tensor:
    """One call as far as its latents, with the method that the pipeline has."""
    arguments = {**_call_arguments(inputs), "output_type": "latent", "return_dict": False}
    return pipe(**arguments)[0]


def execution_device(pipe) -> torch.device:
    """The device on which an offloaded or plain pipeline computes."""
    return torch.device(pipe._execution_device)


class _Clock:
    """When a call began, when its transformer was first called, when a step last ended, and the
    latents that it left."""

    def __init__(self):
        self.latents = None
        self.called = time.perf_counter()
        self.began = self.stepped = self.ended = None

    @property
    def denoise_seconds(self) -> float:
        return (self.stepped or self.ended) - (self.began or self.called)

    @property
    def decode_seconds(self) -> float | None:
        return None if self.stepped is None else self.ended - self.stepped


def timed_call(pipe, inputs: dict, on_step: OnStep) -> tuple[Tensor, "_Clock"]:
    """Frames, uint8 `[B, T, 3, H, W]` on the CPU as they came from the decoder, and the clock of a
    call; `inputs["seed"]` may be a list, one for each prompt. Raises RuntimeError for NaN."""
    device = execution_device(pipe)
    steps = inputs["num_inference_steps"]
    arguments = {**_call_arguments(inputs), "output_type": "pt"}
    clock = _Clock()

    def step_ended(pipe, step, timestep, tensors):
        total = getattr(pipe, "num_timesteps", steps)
        if step + 1 == total:
            _wait(device)
        clock.stepped = time.perf_counter()
        clock.latents = tensors.get("latents")
        on_step(step + 1, total)
        return tensors

    if "callback_on_step_end" in call_parameters(pipe):
        arguments["callback_on_step_end"] = step_ended
    with _first_call(pipe, clock, device):
        frames = _frames(pipe(**arguments))
        _wait(device)
    clock.ended = time.perf_counter()
    on_step(steps, steps)
    if not frames.isfinite().all():
        raise RuntimeError(
            "The frames hold NaN; try --dtype fp32, or --dtype bf16 in place of fp16."
        )
    return (frames * 255).round().to("cpu", torch.uint8), clock


def call_parameters(pipe) -> Mapping[str, inspect.Parameter]:
    """The parameters of the diffusers pipeline's own call."""
    return pipe.stock_signature.parameters


def makes_images(pipe) -> bool:
    """Whether the pipeline's call takes neither a number of frames nor a video."""
    return not FRAMES & call_parameters(pipe).keys()


def _frames(output) -> Tensor:
    """`[B, T, 3, H, W]` of what a pipeline returned; an image is one frame."""
    if hasattr(output, "frames"):
        return output.frames
    # Kandinsky 5 says `image`, all others `images`.
    images = output.images if hasattr(output, "images") else output.image
    return images.unsqueeze(1)


@contextmanager
def _first_call(pipe, clock: _Clock, device: torch.device):
    """Notes when the first transformer is first called; what comes before is not denoising."""

    def note(*_):
        if clock.began is None:
            _wait(device)
            clock.began = time.perf_counter()

    models = [getattr(pipe, name, None) for name in DENOISERS]
    handles = [model.register_forward_pre_hook(note) for model in models if model is not None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _call_arguments(inputs: dict) -> dict:
    arguments = {name: value for name, value in inputs.items() if name != "seed"}
    seeds = inputs["seed"] if isinstance(inputs["seed"], list) else [inputs["seed"]]
    return {**arguments, "generator": [torch.Generator("cpu").manual_seed(x) for x in seeds]}


def _attention(pipe, method: SparseAttention | None) -> dict:
    from vdit_sparse.pipelines.attach import summary

    if method is None:
        return {"density": 1.0}
    said = summary(pipe)
    return {
        "density": said.density,
        "sparse_density": said.sparse_density,
        "attention_calls": said.calls,
        "error": said.error,
        "backend": said.backend,
        "reasons": dict(said.reasons),
    }


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        # Linux: resets the process's highest resident size (proc(5), clear_refs).
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak(device: torch.device) -> int:
    """Bytes. Where the system cannot reset it, the peak since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource  # there is none on Windows

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most
