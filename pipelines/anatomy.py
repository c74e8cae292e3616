"""What a transformer is made of and what a forward costs, read off its modules without weights."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import diffusers
import torch
from torch import nn

from vdit_sparse.grid import Grid
from vdit_sparse.pipelines.checkpoints import Checkpoint
from vdit_sparse.pipelines.families import family_of

# Where the blocks of a transformer are; what lies outside them costs little.
BLOCK = re.compile(r"(\w*(?:blocks|layers|noise_refiner))\.\d+\.")
# Linear layers by path, first match counts: one row a sample, all video tokens, the text's tokens.
ROWS = (
    ("one", re.compile(r"norm|mod|ada_?ln|embed|guidance|gate|time", re.IGNORECASE)),
    ("video", re.compile(r"audio_to_video_attn\.to_(q|out)|video_to_audio_attn\.to_[kv]$")),
    ("text", re.compile(r"context|txt|text|audio|\.add_|to_add_out|_t(\.|$)")),
)
KEYS = re.compile(r"\.(to_k|to_v|to_key|to_value)$")


@dataclass(frozen=True)
class Anatomy:
    """A transformer without its weights.

    layers, heads, head_dim: of the visual self-attention. parameters: of all; kept: of those that
    the class keeps in fp32. video, text: weights of linear layers that every video or text token
    passes; shared: that both pass. widest: features of the widest layer that video tokens pass.
    """

    layers: int
    heads: int
    head_dim: int
    parameters: int
    kept: int
    video: float
    text: float
    shared: float
    widest: int

    @property
    def inner(self) -> int:
        """Features of a token in the self-attention."""
        return self.heads * self.head_dim

    def weights(self, width: int) -> int:
        """Bytes of the weights, `width` bytes each but for those kept in fp32."""
        return (self.parameters - self.kept) * width + 4 * self.kept

    def attention(self, grid: Grid) -> float:
        """FLOPs of dense self-attention in a forward of one batch row."""
        return 4.0 * self.layers * grid.tokens**2 * self.inner

    def rest(self, grid: Grid, text: int) -> float:
        """FLOPs of everything else in a forward of one batch row: linear layers and, where the text
        is not in the sequence (`grid.text` is 0), cross-attention to `text` tokens."""
        linear = self.video * grid.video + self.text * text + self.shared * (grid.video + text)
        cross = 0 if grid.text else 4.0 * self.layers * grid.video * text * self.inner
        return 2.0 * linear + cross

    def activations(self, grid: Grid, width: int, rows: int = 1) -> int:
        """Bytes of a forward's largest moment, roughly: the residual stream in fp32 and twice in
        `width` bytes, then q, k, v, output and one copy, or both sides of the widest layer."""
        inside = max(5 * self.inner, 2 * self.widest)
        return rows * grid.tokens * (4 * self.inner + width * (2 * self.inner + inside))


def meta_transformer(checkpoint: Checkpoint) -> nn.Module:
    """The checkpoint's transformer on the meta device: modules and shapes, no memory. Raises
    ValueError for a configuration that the class does not take."""
    kind = getattr(diffusers, checkpoint.transformer)
    config = {key: value for key, value in checkpoint.config.items() if not key.startswith("_")}
    try:
        with torch.device("meta"):
            return kind(**config)
    except TypeError as error:
        raise ValueError(f"{checkpoint.transformer} does not take its config: {error}.") from error


def anatomy_of(transformer: nn.Module, joint: bool) -> Anatomy:
    """The anatomy of a transformer of a known family, on any device. joint: whether the text is in
    the sequence of the self-attention. The counts are estimates: a layer's tokens follow from its
    name. Raises ValueError as `family_of`."""
    layers = family_of(transformer).layers(transformer)
    first = next(iter(layers.values()))
    heads = getattr(first, "heads", None) or first.num_heads
    query = getattr(first, "to_q", None) or first.to_query
    weights, widest = {"video": 0.0, "text": 0.0, "shared": 0.0}, 0
    for rows, count, features in _linears(transformer, layers, joint):
        weights[rows] += count
        widest = max(widest, features if rows != "text" else 0)
    kept = set(type(transformer)._keep_in_fp32_modules or ())
    parameters = list(transformer.named_parameters())
    return Anatomy(
        len(layers),
        heads,
        query.out_features // heads,
        sum(tensor.numel() for _, tensor in parameters),
        sum(tensor.numel() for name, tensor in parameters if kept & set(name.split("."))),
        **weights,
        widest=widest,
    )


def _linears(
    transformer: nn.Module, layers: dict[str, nn.Module], joint: bool
) -> Iterator[tuple[str, float, int]]:
    """(which tokens pass it, weights that a token meets, features) of each linear layer."""
    found = []
    for name, module in transformer.named_modules():
        inside = BLOCK.search(name + ".")
        if isinstance(module, nn.Linear) and inside:
            found.append((inside[1], _rows(name, layers), _met(transformer, name), module))
    two_streams = {stack for stack, rows, *_ in found if rows == "text"}
    for stack, rows, met, module in found:
        if rows == "one":
            continue
        if rows == "video" and joint and stack not in two_streams:
            rows = "shared"
        yield rows, met * module.weight.numel(), module.out_features


def _rows(name: str, layers: dict[str, nn.Module]) -> str:
    for rows, pattern in ROWS:
        if pattern.search(name):
            return rows
    crossed = KEYS.search(name) and name.rpartition(".")[0] not in layers
    return "text" if crossed else "video"


def _met(transformer: nn.Module, name: str) -> float:
    """The share of a layer's calls that a token makes: of a mixture's experts, only some."""
    if ".experts." not in name:
        return 1.0
    return transformer.config.num_activated_experts / transformer.config.num_routed_experts
