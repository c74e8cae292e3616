"""The judge: a small network that says what a clip shows, and its files.

Convolutions over space and time give features at an eighth of the resolution; one learned query
for every head then reads them by attention. The questions are those of `judge_labels.py`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from vdit_sparse.pipelines.mini.training.judge_labels import classes

FRAMES, HEIGHT, WIDTH = 8, 64, 112
"""What the network sees of every clip."""

CONFIG, WEIGHTS = "config.json", "judge.safetensors"
SHIPPED = Path(__file__).parents[1] / "judge"
_REDUCTION = 8
# Matrices from this many numbers on are stored in 8 bits; the folder of the model is full.
_EIGHT_BITS_FROM, _MOST, _SCALE = 4096, 127, ":scale"


@dataclass(frozen=True)
class JudgeSizes:
    """Numbers that decide a tensor's shape; the defaults are the shipped judge's.

    Attributes:
        widths: channels at a half, a quarter and an eighth of the resolution.
        blocks: residual blocks at each of them.
        readers: rounds in which the queries look at each other and at the features.
        heads: attention heads of a reader; divides the last width.
    """

    widths: tuple[int, int, int] = (32, 64, 128)
    blocks: tuple[int, int, int] = (1, 2, 3)
    readers: int = 2
    heads: int = 4


JUDGES = {
    "released": JudgeSizes(),
    "tiny": JudgeSizes(widths=(8, 16, 32), blocks=(1, 1, 1), readers=1, heads=2),
}


def resample(videos: Tensor) -> Tensor:
    """Eight evenly spaced frames (the nearest ones, never blends), scaled to 64 x 112 pixels.

    videos: float `[B, 3, T, H, W]` of any size; another aspect than 4:7 is stretched. Scaling is
    bilinear with antialiasing.

    Returns:
        float32 `[B, 3, 8, 64, 112]`.
    """
    picked = torch.linspace(0, videos.shape[2] - 1, FRAMES).round().long()
    frames = videos[:, :, picked.to(videos.device)].float().transpose(1, 2)
    if frames.shape[-2:] != (HEIGHT, WIDTH):
        flat = frames.flatten(0, 1)
        flat = F.interpolate(flat, (HEIGHT, WIDTH), mode="bilinear", antialias=True)
        frames = flat.unflatten(0, frames.shape[:2])
    return frames.transpose(1, 2)


class JudgeNetwork(nn.Module):
    """Clips to one row of logits per head, 1.4 million parameters at the shipped sizes.

    Args:
        sizes: the shapes.
        names: head -> classes; default `judge_labels.classes()`.
    """

    def __init__(
        self, sizes: JudgeSizes | None = None, names: Mapping[str, tuple[str, ...]] | None = None
    ) -> None:
        super().__init__()
        self.sizes = sizes or JudgeSizes()
        self.names = dict(names or classes())
        width = self.sizes.widths[-1]
        rows, columns = HEIGHT // _REDUCTION, WIDTH // _REDUCTION
        self.features = nn.Sequential(*_stages(self.sizes))
        self.norm = nn.LayerNorm(width)
        self.moment = nn.Parameter(0.2 * torch.randn(width, FRAMES, 1, 1))
        self.row = nn.Parameter(0.2 * torch.randn(width, 1, rows, 1))
        self.column = nn.Parameter(0.2 * torch.randn(width, 1, 1, columns))
        self.summary = nn.Linear(2 * width, width)
        self.queries = nn.Parameter(torch.randn(len(self.names), width))
        self.readers = nn.ModuleList(
            _Reader(width, self.sizes.heads) for _ in range(self.sizes.readers)
        )
        self.answer_norm = nn.LayerNorm(width)
        self.answers = nn.ModuleList(nn.Linear(width, len(each)) for each in self.names.values())

    def forward(self, clips: Tensor) -> dict[str, Tensor]:
        """Head -> logits `[B, classes]` of clips `[B, 3, 8, 64, 112]` in [-1, 1]."""
        features = self.features(clips) + self.moment + self.row + self.column
        tokens = self.norm(features.flatten(2).transpose(1, 2))
        # A thing covers few tokens: its greatest features reach the answers before attention does.
        pooled = torch.cat([tokens.mean(1), tokens.amax(1)], dim=1)
        queries = self.queries + self.summary(pooled)[:, None]
        for reader in self.readers:
            queries = reader(queries, tokens)
        read = self.answer_norm(queries).unbind(1)
        return {
            name: answer(one)
            for name, answer, one in zip(self.names, self.answers, read, strict=True)
        }

    def matrices(self) -> list[nn.Parameter]:
        """What Muon trains: kernels and matrices between the first layer and the answers."""
        parts = (*self.features[1:], self.summary, self.readers)
        return [p for part in parts for p in part.parameters() if p.ndim > 1]


def _stages(sizes: JudgeSizes) -> list[nn.Module]:
    stem = nn.Conv3d(3, sizes.widths[0], (1, 5, 5), stride=(1, 2, 2), padding=(0, 2, 2))
    stages, before = [stem], None
    for width, blocks in zip(sizes.widths, sizes.blocks, strict=True):
        if before:
            stages.append(_spatial(before, width, stride=2))
        stages += [_Block(width) for _ in range(blocks)]
        before = width
    return stages


def _spatial(inside: int, outside: int, stride: int = 1) -> nn.Conv3d:
    return nn.Conv3d(
        inside, outside, (1, 3, 3), stride=(1, stride, stride), padding=(0, 1, 1), bias=stride > 1
    )


class _ChannelNorm(nn.Module):
    """Scales the channels of each pixel to a mean square of one; unlike group norm it keeps a
    channels-last layout on a GPU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width, 1, 1, 1))
        self.shift = nn.Parameter(torch.zeros(width, 1, 1, 1))

    def forward(self, clips: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(clips, dim=1, keepdim=True, dtype=torch.float32)
        inverse = clips.shape[1] ** 0.5 / (length + 1e-4)
        scaled = clips * inverse.to(clips.dtype)
        return torch.addcmul(self.shift.to(clips.dtype), scaled, self.scale.to(clips.dtype))


class _Block(nn.Module):
    """A residual block: a convolution over each frame, then one over each pixel's time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(_ChannelNorm(width) for _ in range(2))
        self.space = _spatial(width, width)
        self.time = nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0))
        nn.init.zeros_(self.time.weight)
        nn.init.zeros_(self.time.bias)

    def forward(self, clips: Tensor) -> Tensor:
        hidden = self.space(F.silu(self.norms[0](clips)))
        return clips + self.time(F.silu(self.norms[1](hidden)))


class _Reader(nn.Module):
    """The queries `[B, heads, width]` look at each other, then at tokens `[B, n, width]`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.among = _Attention(width, heads)
        self.across = _Attention(width, heads)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        first = self.norms[0](queries)
        queries = queries + self.among(first, first)
        queries = queries + self.across(self.norms[1](queries), tokens)
        return queries + self.narrow(F.gelu(self.wide(self.norms[2](queries))))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q(queries), self.k(context), self.v(context))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def save_judge(network: JudgeNetwork, folder: Path, facts: dict) -> int:
    """Writes the weights, kernels and matrices in 8 bits, one scale for each output, the rest in
    bf16, and `config.json` (sizes, classes, `facts`); returns the bytes of both.

    facts: what else a reader of the config should know, for instance `held_out` accuracies.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for name, tensor in network.state_dict().items():
        weights |= _stored(name, tensor.detach().float().cpu())
    # safetensors' own file would be readable by its owner alone, in a wheel too.
    (folder / WEIGHTS).write_bytes(save(weights))
    config = {"sizes": asdict(network.sizes), "classes": network.names, **facts}
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    return sum((folder / name).stat().st_size for name in (CONFIG, WEIGHTS))


def _stored(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if tensor.ndim < 2 or tensor.numel() < _EIGHT_BITS_FROM:
        return {name: tensor.to(torch.bfloat16).contiguous()}
    largest = tensor.flatten(1).abs().amax(1).clamp(min=1e-30)
    rows = tensor / largest.view(-1, *[1] * (tensor.ndim - 1)) * _MOST
    return {name: rows.round().to(torch.int8).contiguous(), name + _SCALE: largest / _MOST}


def _restored(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name in (name for name in stored if not name.endswith(_SCALE)):
        tensor = stored[name].float()
        if name + _SCALE in stored:
            tensor *= stored[name + _SCALE].view(-1, *[1] * (tensor.ndim - 1))
        found[name] = tensor
    return found


def load_network(folder: Path) -> tuple[JudgeNetwork, dict]:
    """The network in float32 on the CPU, frozen, and the whole config.

    Raises FileNotFoundError where there is no judge.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"Expected {CONFIG} and {WEIGHTS} in {folder}, found none: train a judge with "
            "`python -m vdit_sparse.pipelines.mini.training.train judge`."
        )
    config = json.loads((folder / CONFIG).read_text())
    sizes = {name: tuple(v) if isinstance(v, list) else v for name, v in config["sizes"].items()}
    names = {name: tuple(each) for name, each in config["classes"].items()}
    network = JudgeNetwork(JudgeSizes(**sizes), names)
    network.load_state_dict(_restored(load_file(folder / WEIGHTS)))
    return network.eval().requires_grad_(False), config
