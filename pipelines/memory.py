"""What a pipeline weighs, whether it fits, and where its parts wait if it does not."""

from collections.abc import Mapping
from pathlib import Path

import psutil
import torch
from diffusers import DiffusionPipeline

# What waits in RAM: nothing, whole models that are not in use, layers, layers streamed ahead.
OFFLOADS = ("none", "model", "sequential", "group")
GIB = 2**30
# Of a GPU's memory, what the weights may take; the rest is for activations.
FILL = 0.9


def component_bytes(pipe: DiffusionPipeline) -> dict[str, int]:
    """Bytes of the weights and buffers of each of a pipeline's models."""
    return {
        name: sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
        for name, model in pipe.components.items()
        if isinstance(model, torch.nn.Module)
    }


def needed_bytes(sizes: Mapping[str, int], offload: str) -> int:
    """Bytes of weights that are on the device at once: all, those of the largest model, or about a
    fiftieth of it (a layer, and the one that is fetched)."""
    if offload == "none":
        return sum(sizes.values())
    largest = max(sizes.values(), default=0)
    return largest if offload == "model" else largest // 50


def fitting_offload(sizes: Mapping[str, int], free: int) -> str | None:
    """The fastest of "none", "model" and "group" whose weights leave a tenth of `free` bytes for
    activations; None if there is none."""
    fits = (one for one in ("none", "model", "group") if needed_bytes(sizes, one) <= FILL * free)
    return next(fits, None)


def check_fits(sizes: Mapping[str, int], offload: str, free: int) -> None:
    """Raises MemoryError, naming the offloading that fits, if the weights do not fit into `free`
    bytes of the device."""
    needed = needed_bytes(sizes, offload)
    if needed <= free:
        return
    advice = fitting_offload(sizes, free)
    others = {"none": "", "model": " (whole models wait in RAM)", "group": " (layers wait in RAM)"}
    raise MemoryError(
        f"The weights need {needed / GIB:.1f} GiB on the device with offload={offload!r}, and "
        f"{free / GIB:.1f} GiB are free: "
        + (f"use offload={advice!r}{others[advice]}." if advice else "use a smaller model.")
    )


def check_ram(folder: Path) -> None:
    """Raises MemoryError if the weight files of a model in a folder are larger than the RAM and
    swap that are available: weights pass through RAM on their way to a GPU."""
    needed = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    there = psutil.virtual_memory().available + psutil.swap_memory().free
    if needed > there:
        raise MemoryError(
            f"{folder} has {needed / GIB:.1f} GiB of weights, and {there / GIB:.1f} GiB of RAM are "
            "available: close other programs, or load the transformer from a quantised file (GGUF)."
        )


def place(pipe: DiffusionPipeline, offload: str, device: torch.device) -> None:
    """Puts a pipeline on its device, or has it wait in RAM and come when needed.

    offload: "none", "model" (each model comes as a whole), "sequential" (layer by layer, slow) or
        "group" (layer by layer, the next one fetched meanwhile on CUDA). Raises ValueError for
        another word and for offloading to a CPU, MemoryError as `check_fits` on CUDA.
    """
    if offload not in OFFLOADS:
        raise ValueError(f"offload must be one of {OFFLOADS}, got {offload!r}.")
    if offload != "none" and device.type == "cpu":
        raise ValueError(f"offload={offload!r} needs a GPU, but the device is the CPU.")
    if device.type == "cuda":
        check_fits(
            _absent_bytes(pipe, offload, device), offload, torch.cuda.mem_get_info(device)[0]
        )
    if offload == "none":
        pipe.to(device)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.enable_group_offload(
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="leaf_level",
            use_stream=device.type == "cuda",
        )


def _absent_bytes(pipe: DiffusionPipeline, offload: str, device: torch.device) -> dict[str, int]:
    """`component_bytes` of the models that are not on the device yet."""
    there = pipe.components
    return {
        name: size
        for name, size in component_bytes(pipe).items()
        if offload != "none" or next(there[name].parameters()).device.type != device.type
    }
