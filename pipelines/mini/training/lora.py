"""Low-rank changes of a frozen transformer (LoRA, arXiv 2106.09685)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRALinear(nn.Module):
    """A frozen linear layer and a trained change of rank r: `(W + up @ down) x + b`.

    Differs from the paper: the change is added to the weight in every forward, not computed beside
    it, which is cheaper where there are more tokens than columns and is what inference runs after
    merging; and the paper's scale `alpha / r` is 1.

    Args:
        linear: the layer, `[out, in]`; its weights are shared and frozen.
        rank: columns of `up [out, rank]` (zero at first) and rows of `down [rank, in]`.
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.weight = linear.weight.requires_grad_(False)
        self.bias = None if linear.bias is None else linear.bias.requires_grad_(False)
        rows, columns = linear.weight.shape
        self.up = nn.Parameter(linear.weight.new_zeros(rows, rank))
        self.down = nn.Parameter(torch.randn_like(linear.weight.new_empty(rank, columns)))
        self.down.data *= columns**-0.5

    def forward(self, x: Tensor) -> Tensor:
        """x: `[..., in]`; returns `[..., out]`."""
        return F.linear(x, self.weight + self.up @ self.down, self.bias)


def add_lora(transformer: nn.Module, rank: int) -> None:
    """Freezes a module and gives every linear layer in it a change of this rank, in place."""
    transformer.requires_grad_(False)
    linear = [(n, m) for n, m in transformer.named_modules() if isinstance(m, nn.Linear)]
    for name, layer in linear:
        parent, _, leaf = name.rpartition(".")
        setattr(transformer.get_submodule(parent), leaf, LoRALinear(layer, rank))


def lora_layers(transformer: nn.Module) -> dict[str, LoRALinear]:
    """Returns the layers that `add_lora` made, by name."""
    return {n: m for n, m in transformer.named_modules() if isinstance(m, LoRALinear)}


def lora_state(transformer: nn.Module) -> dict[str, Tensor]:
    """Returns the trained tensors, `NAME.up` and `NAME.down` of every layer, without gradients."""
    return {
        f"{name}.{part}": getattr(layer, part).detach()
        for name, layer in lora_layers(transformer).items()
        for part in ("up", "down")
    }


def factors(state: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Turns `lora_state` into `(up [out, rank], down [rank, in])` by layer name."""
    names = [name.removesuffix(".up") for name in state if name.endswith(".up")]
    return {name: (state[f"{name}.up"], state[f"{name}.down"]) for name in names}
