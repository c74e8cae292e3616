"""Which model families there are, and what each one must say about itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module

import torch
from torch import Tensor

from vdit_sparse.grid import Grid
from vdit_sparse.method import SparseAttention

# Transformer class -> module that holds its `FAMILY`; imported on demand.
FAMILIES = {
    "AllegroTransformer3DModel": "vdit_sparse.pipelines.allegro",
    "ChromaTransformer2DModel": "vdit_sparse.pipelines.chroma",
    "CogVideoXTransformer3DModel": "vdit_sparse.pipelines.cogvideox",
    "CosmosTransformer3DModel": "vdit_sparse.pipelines.cosmos",
    "Flux2Transformer2DModel": "vdit_sparse.pipelines.flux2",
    "FluxTransformer2DModel": "vdit_sparse.pipelines.flux",
    "HiDreamImageTransformer2DModel": "vdit_sparse.pipelines.hidream",
    "HunyuanDiT2DModel": "vdit_sparse.pipelines.hunyuan_dit",
    "HunyuanVideo15Transformer3DModel": "vdit_sparse.pipelines.hunyuan_video15",
    "HunyuanVideoTransformer3DModel": "vdit_sparse.pipelines.hunyuan_video",
    "Kandinsky5Transformer3DModel": "vdit_sparse.pipelines.kandinsky5",
    "LTX2VideoTransformer3DModel": "vdit_sparse.pipelines.ltx2",
    "LTXVideoTransformer3DModel": "vdit_sparse.pipelines.ltx_video",
    "MochiTransformer3DModel": "vdit_sparse.pipelines.mochi",
    "PixArtTransformer2DModel": "vdit_sparse.pipelines.pixart",
    "QwenImageTransformer2DModel": "vdit_sparse.pipelines.qwen_image",
    "SD3Transformer2DModel": "vdit_sparse.pipelines.stable_diffusion_3",
    "SkyReelsV2Transformer3DModel": "vdit_sparse.pipelines.skyreels_v2",
    "WanTransformer3DModel": "vdit_sparse.pipelines.wan",
    "WanVACETransformer3DModel": "vdit_sparse.pipelines.wan_vace",
    "ZImageTransformer2DModel": "vdit_sparse.pipelines.z_image",
}
# Transformer class -> why it has no sparse attention.
REFUSED = {
    "QwenImage21Transformer2DModel": "its text is causal, and queries and keys are not the same "
    "tokens",
    "SanaTransformer2DModel": "its self-attention is linear: it has no weights to leave out",
}

# Components of a pipeline that hold a transformer; Wan 2.2 has one for each noise range.
DENOISERS = ("transformer", "transformer_2")

# Arguments of a transformer's forward, by name.
Arguments = Mapping[str, object]


def _timestep(arguments: Arguments) -> Tensor:
    return arguments["timestep"]


def _no_refusal(transformer: torch.nn.Module) -> None:
    return None


@dataclass(frozen=True)
class Parallel:
    """How the tokens of a family's self-attention are split over GPUs.

    joint: prompt and video are split each for itself, so that every GPU has a part of both.
    plan: transformer -> the `cp_plan` of diffusers' `enable_parallelism`; None for its class's own.
    exchanging: ends of the paths of further attention modules whose keys are split; the others
        have all their keys in every process.
    refuses: transformer -> why it cannot be split, or None.
    """

    joint: bool = False
    plan: Callable[[torch.nn.Module], Mapping] | None = None
    exchanging: tuple[str, ...] = ()
    refuses: Callable[[torch.nn.Module], str | None] = _no_refusal

    def parts(self, grid: Grid, lead: int) -> tuple[int, ...]:
        """Lengths of what is split, in the order of the sequence."""
        if not self.joint:
            return (grid.tokens,)
        first = lead or grid.video
        return first, grid.tokens - first


@dataclass(frozen=True)
class Family:
    """One model family's side of the contract with `attach`.

    processors: class of each stock processor that is replaced -> class of ours, made as
        `ours(number of the run, layer)`. A layer with any other processor is refused.
    layers: transformer -> its visual self-attention modules by name, in execution order.
    grid: (transformer, arguments of its forward) -> Grid of this call; `text` counts all tokens of
        the sequence that are no video. A layer whose sequence is the video alone may be among the
        layers: its calls have no text.
    lead: (transformer, arguments) -> how many of the text tokens stand before the video in the
        sequence that processors see; None where all stand after it.
    timestep: arguments -> a tensor whose largest value falls from step to step.
    steps: pipeline -> how many steps the run in progress makes, where these are not the scheduler's
        timesteps; None where they are.
    refuses: (transformer, method) -> why the method cannot run on it, or None.
    presets: settings published for, or measured on, this family's checkpoints.
    parallel: how its tokens are split over GPUs; None where they cannot be.
    """

    processors: Mapping[type, type]
    layers: Callable[[torch.nn.Module], dict[str, torch.nn.Module]]
    grid: Callable[[torch.nn.Module, Arguments], Grid]
    lead: Callable[[torch.nn.Module, Arguments], int] | None = None
    timestep: Callable[[Arguments], Tensor] = _timestep
    steps: Callable[[object], int | None] | None = None
    refuses: Callable[[torch.nn.Module, SparseAttention], str | None] | None = None
    presets: Mapping[str, SparseAttention] = field(default_factory=dict)
    parallel: Parallel | None = None


def family_of(transformer: torch.nn.Module) -> Family:
    """The family of a diffusers transformer. Raises ValueError, naming the supported classes, if
    there is none."""
    name = type(transformer).__name__
    for kind in type(transformer).__mro__:
        if kind.__name__ in REFUSED:
            raise ValueError(f"No sparse attention for {name}: {REFUSED[kind.__name__]}.")
        if kind.__name__ in FAMILIES:
            return import_module(FAMILIES[kind.__name__]).FAMILY
    raise ValueError(
        f"No sparse attention for {name}; there is for: {', '.join(sorted(FAMILIES))}."
    )


def preset(transformer: torch.nn.Module, name: str) -> SparseAttention:
    """The named preset of the transformer's family. Raises ValueError with the names there are."""
    presets = family_of(transformer).presets
    if name not in presets:
        raise ValueError(
            f"Unknown preset {name!r} for {type(transformer).__name__}; there are: "
            f"{', '.join(sorted(presets)) or 'none yet'}."
        )
    return presets[name]
