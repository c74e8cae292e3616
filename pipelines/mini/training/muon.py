"""Muon: momentum whose every matrix is replaced by its nearest orthogonal one."""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_QUINTIC = (3.4445, -4.7750, 2.0315)
_ADAM_LIKE_SCALE = 0.2


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Maps every matrix `U S V^T` near to `U V^T` by a quintic Newton-Schulz iteration in bf16.

    The coefficients are Keller Jordan's (https://kellerjordan.github.io/posts/muon): they trade an
    exact limit for speed, singular values end between about 0.7 and 1.2.

    Args:
        matrices: `[count, rows, columns]`, any floating dtype.
        steps: iterations; 5 bring singular values above 1e-3 of the largest into that range.

    Returns:
        `[count, rows, columns]` bf16.
    """
    first, second, third = _QUINTIC
    update = matrices / (torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True) + 1e-7)
    update = update.bfloat16()
    tall = update.shape[1] > update.shape[2]
    if tall:
        update = update.mT
    for _ in range(steps):
        gram = update @ update.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=second, alpha=third)
        update = torch.baddbmm(update, polynomial, update, beta=first)
    return update.mT if tall else update


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum for parameters of two or more dimensions.

    A convolution's kernel `[out, in, ...]` counts as the matrix `[out, in * ...]`. The step has
    the size of an AdamW step, `lr * 0.2 * sqrt(max(rows, columns))` times an orthogonal matrix
    (Moonlight, arXiv 2502.16982, section 2.2), so both optimizers can share one learning rate.
    Parameters of one shape are updated in one batch of matrix products.

    Args:
        parameters: tensors of two or more dimensions.
        lr: learning rate.
        momentum: decay of the running gradient.
        weight_decay: decoupled, times `lr`.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float = 2e-3,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(parameters, defaults)
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if parameter.ndim < 2:
                raise ValueError(
                    f"Muon needs matrices, got a parameter of shape {tuple(parameter.shape)}: "
                    "give vectors and scalars to AdamW"
                )

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Updates every parameter that has a gradient; closures are not supported."""
        if closure is not None:
            raise ValueError("Muon.step expects no closure: compute the gradients before the call")
        for group in self.param_groups:
            shapes = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    rows = parameter.shape[0]
                    shapes[rows, parameter.numel() // rows].append(parameter)
            for shape, parameters in shapes.items():
                self._update(parameters, max(shape), group)

    def _update(self, parameters: list[nn.Parameter], longest: int, group: dict) -> None:
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters]
        running = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(running, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, running, group["momentum"])
        update = orthogonalise(torch.stack([matrix.flatten(1) for matrix in ahead]))
        step = group["lr"] * _ADAM_LIKE_SCALE * math.sqrt(longest)
        directions = [
            matrix.view(parameter.shape).to(parameter.dtype)
            for matrix, parameter in zip(update, parameters, strict=True)
        ]
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, directions, alpha=-step)
