"""What several kernels ask of their inputs; each function raises where that is not so."""

from math import isfinite

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_last_stride(**tensors: Tensor) -> None:
    """Raises ValueError unless the rows of each tensor lie in one piece."""
    for name, x in tensors.items():
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(
                f"{name} must have unit stride in its last dimension, got strides {x.stride()}; "
                f"pass {name}.contiguous()."
            )


def check_inference(what: str, **tensors: Tensor) -> None:
    """Raises RuntimeError if a tensor requires gradients while they are recorded."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors.values()):
        raise RuntimeError(
            f"{what} has no backward: call it under torch.no_grad() or torch.inference_mode(), or "
            f"detach {', '.join(tensors)}."
        )


def check_device(x: Tensor, name: str, other: Tensor, other_name: str) -> None:
    """Raises ValueError unless x, called `name`, is on the device of `other`."""
    if x.device != other.device:
        raise ValueError(f"{name} must be on {other.device} like {other_name}, got {x.device}.")


def check_valid(valid: Tensor, blocks: int, other: Tensor, other_name: str) -> None:
    """Raises ValueError unless `valid` is int32 `[blocks]` on the device of `other`."""
    if valid.dtype != torch.int32 or valid.shape != (blocks,):
        raise ValueError(f"valid must be int32 [{blocks}], got {valid.dtype} {tuple(valid.shape)}.")
    check_device(valid, "valid", other, other_name)


def checked_scale(scale: float | None, D: int) -> float:
    """`scale`, or D^-0.5 for None. Raises ValueError unless it is finite and positive."""
    if scale is None:
        scale = D**-0.5
    if not (isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a positive number, got {scale}.")
    return float(scale)
