"""ST-LPIPS with an AlexNet trunk: how different two pictures look.

The decoder's last steps of training use it, and `eval/metrics/st_lpips.py`.

Shift-tolerant LPIPS, Ghildyal and Liu, ECCV 2022, arXiv 2207.13686. The published weights come in
the package stlpips-pytorch (BSD 2-clause), as `weights/vST0.0/alex_shift_tolerant.pth`. This file
reads their numbers; it uses none of that package's code, whose import needs torchvision.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# (key of the weights, padding, whether a max-pool and a blurred halving come before, and after)
_LAYERS = (
    ("net.slice1.0", 2, False, True),
    ("net.slice2.5", 2, True, False),
    ("net.slice3.9", 1, True, False),
    ("net.slice4.11", 1, False, False),
    ("net.slice5.13", 1, False, False),
)
_SCALING = ("scaling_layer.shift", "scaling_layer.scale")
SMALLEST = 32


class PerceptualDistance(nn.Module):
    """Weighted squared differences of normalised AlexNet features, summed over five layers.

    Differs from LPIPS (arXiv 1801.03924) as the paper says: the first convolution has stride 1,
    every stride is a 3 x 3 blur with reflected borders, so a shift by a pixel changes little.

    Args:
        path: a safetensors file written by `convert_weights`, or the published `.pth`.
    """

    def __init__(self, path: Path | str) -> None:
        super().__init__()
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"expected ST-LPIPS weights at {path}, found no file: see README.md, 'Weights of "
                f"ST-LPIPS', or leave --perceptual out"
            )
        published = Path(path).suffix == ".pth"
        for name, tensor in (_published(path) if published else load_file(path)).items():
            self.register_buffer(name.replace(".", "_"), tensor.float())
        taps = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("blur", torch.outer(taps, taps)[None, None] / 16)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Returns a distance per picture, `[pictures]` float32, 0 for equal ones.

        Args:
            first: `[pictures, 3, height, width]` in [-1, 1], sides of at least 32 pixels.
            second: the same shape.
        """
        if min(first.shape[-2:]) < SMALLEST:
            raise ValueError(f"expected sides of at least {SMALLEST}, got {tuple(first.shape)}")
        total = torch.zeros(len(first), device=first.device)
        pairs = zip(self._features(first), self._features(second), strict=True)
        for layer, (one, other) in enumerate(pairs):
            difference = (_normalise(one) - _normalise(other)).square()
            weight = getattr(self, f"lin{layer}_model_1_weight").view(-1, 1, 1)
            total = total + (weight * difference).sum(1).mean((1, 2))
        return total

    def _features(self, pictures: Tensor) -> list[Tensor]:
        hidden = (pictures - self.scaling_layer_shift) / self.scaling_layer_scale
        found = []
        for key, padding, pooled, halved in _LAYERS:
            if pooled:
                hidden = self._halve(F.max_pool2d(hidden, 3, 1))
            name = key.replace(".", "_")
            weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
            hidden = F.conv2d(hidden, weight, bias, padding=padding)
            hidden = F.relu(self._halve(hidden) if halved else hidden)
            found.append(hidden)
        return found

    def _halve(self, hidden: Tensor) -> Tensor:
        channels = hidden.shape[1]
        kernel = self.blur.expand(channels, 1, 3, 3)
        padded = F.pad(hidden, (2, 2, 2, 2), mode="reflect")
        return F.conv2d(padded, kernel, stride=2, groups=channels)


def convert_weights(source: Path | str, target: Path | str) -> None:
    """Writes the weights of the published `.pth` that are needed, as float16 safetensors (5 MB)."""
    state = _published(source)
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half().contiguous() for name, tensor in state.items()}, target)


def _published(source: Path | str) -> dict[str, Tensor]:
    """The weights of the published `.pth` that are needed."""
    state = torch.load(source, map_location="cpu", weights_only=True)
    layers = [f"{key}.{kind}" for key, *_ in _LAYERS for kind in ("weight", "bias")]
    names = [*_SCALING, *layers, *(f"lin{i}.model.1.weight" for i in range(len(_LAYERS)))]
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(
            f"expected the weights of alex_shift_tolerant.pth in {source}, missing {missing}"
        )
    return {name: state[name] for name in names}


def _normalise(features: Tensor) -> Tensor:
    features = features.float()
    return features / (features.square().sum(1, keepdim=True) + 1e-10).sqrt()
