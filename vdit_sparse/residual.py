"""Tensors that wait between denoising steps, in 16 or 8 bits, on the device or off it."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

# Each dtype's itself, or None for that of the inputs.
DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8, "same": None}
# The largest value of those that need a scale.
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor `[..., D]` in a narrower dtype; `load` brings it back.

    The 8-bit dtypes have one fp32 scale a row of D values, so that with m the row's largest
    magnitude int8 is off by at most m / 254, and fp8 (e4m3) by a sixteenth of a value, or by
    m / 458752 where that is more. bf16 is off by 1/256 of a value.
    """

    values: Tensor
    scale: Tensor | None

    def load(self, device: torch.device) -> Tensor:
        """The tensor on `device`: fp32, or the dtype of `values` where that has 16 bits or more."""
        values = self.values.to(device, non_blocking=True)
        return values if self.scale is None else values.float() * self.scale


def store(x: Tensor, dtype: torch.dtype, offload: bool = False) -> Stored:
    """Keeps x `[..., D]` as `dtype`; offload=True puts its values into the CPU's memory, pinned
    where x is on a CUDA device, without waiting for the copy. Scales stay on the device."""
    scale = None
    if dtype in LARGEST:
        x = x.float()
        scale = x.abs().amax(-1, keepdim=True).clamp_(min=1e-30) / LARGEST[dtype]
        x = x / scale
        x = x.round() if dtype == torch.int8 else x
    values = x.to(dtype)
    if offload and values.device.type == "cuda":
        pinned = torch.empty(values.shape, dtype=dtype, device="cpu", pin_memory=True)
        values = pinned.copy_(values, non_blocking=True)
    elif offload:
        values = values.cpu()
    return Stored(values, scale)


def row_bytes(dtype: torch.dtype, size: int) -> int:
    """Bytes that `store` takes for a row of `size` values, with its scale."""
    return size * dtype.itemsize + (4 if dtype in LARGEST else 0)


def announce(need: int, device: torch.device, offload: bool) -> None:
    """Logs that `need` bytes will be taken for what the layers of one guidance branch keep.

    Raises MemoryError if `device` is a CUDA device and has less free, unless `offload`.
    """
    text = f"Re-ttention keeps {need / 1e9:.2f} GB for this guidance branch until the run ends"
    logging.getLogger("vdit_sparse").info(text)
    if offload or device.type != "cuda":
        return
    # What torch has reserved and not given out is free for tensors too.
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free -= torch.cuda.memory_allocated(device)
    if need > free:
        raise MemoryError(
            f'{text}, but {device} has {free / 1e9:.2f} GB free: use residual_dtype="int8", '
            "offload=True or more dense_layers."
        )
