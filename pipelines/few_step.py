"""`mini-fast`, the bundled model in few steps: a LoRA merged into its transformer, and a sampler.

`mini/transformer_fast/` holds only what differs from `mini/`, because a second transformer would
not fit into 64 MB: `lora.safetensors`, `scheduler_config.json` and `generation.json`. The stage
`distill` of `mini/training/train.py` writes it.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from safetensors.torch import load_file, save
from torch import Tensor, nn

FOLDER = "transformer_fast"
WEIGHTS = "lora.safetensors"
BASE = "base.proj_out.bias"
_MOST = 127


def load_few_step(pipe: DiffusionPipeline, model: Path) -> dict:
    """Turns a loaded pipeline into its few-step variant, in place.

    `pipe.save_pretrained` then writes a folder that plain diffusers loads, as large as the model.

    Args:
        pipe: loaded from `model`, with its weights in memory, in any floating dtype.
        model: folder with a subfolder `transformer_fast`.

    Returns:
        The call's arguments that differ from the model's: steps and guidance scale. The LoRA is
        made for this number of steps; any other visits times that it was not trained at.

    Raises FileNotFoundError without such weights, ValueError for those of another transformer.
    """
    folder = model / FOLDER
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"The few-step weights are not there: expected {folder / WEIGHTS}, found none. Use the "
            "model without them (leave the name out), or make them with the training stage "
            "'distill'."
        )
    merge(pipe.transformer, load_file(folder / WEIGHTS))
    pipe.scheduler = type(pipe.scheduler).from_pretrained(folder)
    return json.loads((folder / "generation.json").read_text())


def save_few_step(
    model: Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    base: Tensor,
    scheduler: SchedulerMixin,
    generation: Mapping[str, float],
) -> int:
    """Writes what `load_few_step` reads and returns the weights' bytes.

    Args:
        model: folder of the pipeline; gets the subfolder `transformer_fast`.
        factors: `up [out, rank]` and `down [rank, in]` of each linear layer, by its name.
        base: `proj_out.bias` of the transformer without the LoRA, by which it is recognised.
        scheduler: the sampler.
        generation: the call's arguments that differ from the model's.
    """
    folder = model / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {BASE: base.detach().cpu().bfloat16()}
    for name, (up, down) in factors.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in quantise(up, down).items()}
    # safetensors' own file would be readable by its owner alone, in a wheel too.
    (folder / WEIGHTS).write_bytes(save(tensors))
    scheduler.save_pretrained(folder)
    (folder / "generation.json").write_text(json.dumps(dict(generation), indent=2) + "\n")
    return (folder / WEIGHTS).stat().st_size


def quantise(up: Tensor, down: Tensor) -> dict[str, Tensor]:
    """Stores `up @ down` in 8 bits a number, one scale for each of the `rank` components.

    Args:
        up: `[out, rank]`, any floating dtype.
        down: `[rank, in]`.

    Returns:
        `up [rank, out]` and `down [rank, in]` int8, `scale [rank]` fp32, on the CPU: the product
        is `(up.T * scale) @ down`. A number is off by at most 1/254 of its component's largest.
    """
    rows = {"up": up.detach().float().cpu().T, "down": down.detach().float().cpu()}
    largest = {part: row.abs().amax(1, keepdim=True) for part, row in rows.items()}
    stored = {
        part: (row / largest[part].clamp(min=1e-30) * _MOST).round().to(torch.int8).contiguous()
        for part, row in rows.items()
    }
    return {**stored, "scale": (largest["up"] * largest["down"]).flatten() / _MOST**2}


@torch.no_grad()
def merge(transformer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Adds the LoRA to the weights, `W + up @ down`, in fp32, rounded once to their dtype.

    Raises ValueError, before anything is changed, if the LoRA is of another transformer.
    """
    layers = _layers(transformer, tensors)
    for name, layer in layers.items():
        up, down, scale = (
            tensors[f"{name}.{part}"].to(layer.weight.device, torch.float32)
            for part in ("up", "down", "scale")
        )
        layer.weight.copy_(layer.weight.float() + (up.T * scale) @ down)


def _layers(transformer: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, nn.Linear]:
    linear = {n: m for n, m in transformer.named_modules() if isinstance(m, nn.Linear)}
    names = [name.removesuffix(".up") for name in tensors if name.endswith(".up")]
    for name in names:
        expected = (tensors[f"{name}.up"].shape[1], tensors[f"{name}.down"].shape[1])
        found = tuple(linear[name].weight.shape) if name in linear else None
        if found != expected:
            raise ValueError(
                f"The few-step LoRA is of another transformer: it has a linear layer {name} of "
                f"{expected}, this one {found}. {_AGAIN}"
            )
    # Wider than the rounding of any dtype, narrower than what more training changes.
    base, own = tensors[BASE].float(), transformer.proj_out.bias.float().cpu()
    if not torch.allclose(own, base, rtol=1e-2, atol=1e-6):
        raise ValueError(
            f"The few-step LoRA was made for other weights: proj_out.bias differs by up to "
            f"{(own - base).abs().max():.2g}. {_AGAIN}"
        )
    return {name: linear[name] for name in names}


_AGAIN = "Distil this transformer again (training stage 'distill')."
