"""Which of torch's attention kernels trains fastest at a given shape on this machine."""

import time

import torch

from vdit_sparse.pipelines.mini.training.pacing import report

_ROUNDS = 3


def fastest_attention(shape: tuple[int, int, int, int], device: str) -> str:
    """Times forward and backward of torch's kernels and names the winner as diffusers does.

    Args:
        shape: `(batch, tokens, heads, head_dim)`.
        device: torch device; anything but CUDA has one kernel, "native".

    Returns:
        A name for `set_attention_backend`. Kernels that cannot run here are reported and left out.
    """
    if not device.startswith("cuda"):
        return "native"
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    seconds = {}
    for name in ("native", "_native_cudnn", "_native_flash"):
        try:
            seconds[name] = _time(shape, device, dispatch_attention_fn, AttentionBackendName(name))
        except (RuntimeError, ValueError) as error:
            report(f"attention {name} does not run here: {error}")
    report(
        "attention, ms forward and backward:", {n: round(1e3 * s, 2) for n, s in seconds.items()}
    )
    return min(seconds, key=seconds.get)


def _time(shape, device, attend, backend) -> float:
    query, key, value = (
        torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    gradient = torch.randn_like(query)
    for index in range(_ROUNDS + 1):
        if index == 1:
            torch.cuda.synchronize()
            start = time.perf_counter()
        attend(query, key, value, backend=backend).backward(gradient)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / _ROUNDS
