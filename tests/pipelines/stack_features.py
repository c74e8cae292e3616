"""What users put on a diffusers model beside a method: each feature as one function."""

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import accelerate
import torch
from diffusers import (
    DiffusionPipeline,
    FirstBlockCacheConfig,
    LayerSkipConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
from diffusers.hooks.layer_skip import apply_layer_skip
from peft import LoraConfig, get_peft_model_state_dict
from torch._dynamo.testing import CompileCounterWithBackend

from vdit_sparse.pipelines.attach import denoisers_of
from vdit_sparse.pipelines.families import family_of
from vdit_sparse.pipelines.processor import skipped

CACHED_STEPS = 4


@dataclass(frozen=True)
class Feature:
    """put: (pipeline, empty folder) -> puts the feature on the pipeline.

    effect: whether stock output changes with it; where it does not, it is where weights lie.
    tolerance: largest difference between the stock attention and ours when dense.
    package: what has to be installed.
    steps: of the run; a cache needs a few.
    """

    title: str
    put: Callable[[DiffusionPipeline, Path], None]
    effect: bool = True
    tolerance: float = 0.0
    package: str | None = None
    steps: int = 2


def models(pipe: DiffusionPipeline) -> Iterator[torch.nn.Module]:
    yield from denoisers_of(pipe).values()


def layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return family_of(model).layers(model)


def compile_regionally(pipe, folder):
    """Block by block, every block one graph. Where diffusers does not name the repeated blocks,
    the blocks that own the layers."""
    pipe.graphs = CompileCounterWithBackend("aot_eager")
    for model in models(pipe):
        if getattr(model, "_repeated_blocks", None):
            model.compile_repeated_blocks(fullgraph=True, backend=pipe.graphs)
            continue
        owners = {path.rpartition(".")[0] for path in layers(model)}
        for path in sorted(owners):
            model.get_submodule(path).compile(fullgraph=True, backend=pipe.graphs)


def offload_groups(kind: str, **options):
    def put(pipe, folder):
        for number, model in enumerate(models(pipe)):
            # From disk, so that the weights are really gone in between on a CPU too.
            model.enable_group_offload(
                onload_device=torch.device("cpu"),
                offload_type=kind,
                offload_to_disk_path=str(folder / str(number)),
                **options,
            )

    return put


def offload_models(pipe, folder):
    pipe.enable_model_cpu_offload(device="cpu")


def offload_sequentially(pipe, folder):
    """What `enable_sequential_cpu_offload` does to a transformer; weights are on "meta" in between.
    Its own call fails on a CPU in a text encoder."""
    for model in models(pipe):
        has_weights = len(model._parameters) > 0
        accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=has_weights)


def cast_layerwise(pipe, folder):
    for model in models(pipe):
        model.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
        )


def load_lora(pipe, folder):
    """A LoRA of all projections of the layers, loaded as users do."""
    for name, model in denoisers_of(pipe).items():
        trained = copy.deepcopy(model)
        names = [
            f"{path}.{name}"
            for path, layer in layers(trained).items()
            for name, part in layer.named_modules()
            if type(part) is torch.nn.Linear
        ]
        torch.manual_seed(1)
        trained.add_adapter(LoraConfig(r=2, target_modules=names, init_lora_weights=False))
        found = {key: w.clone() for key, w in get_peft_model_state_dict(trained).items()}
        if hasattr(pipe, "load_lora_weights") and name == "transformer":
            pipe.load_lora_weights({f"transformer.{key}": w for key, w in found.items()})
        else:
            model.load_lora_adapter(found, prefix=None)


def fuse_projections(pipe, folder):
    for model in models(pipe):
        model.fuse_qkv_projections()


def set_backend(pipe, folder):
    for model in models(pipe):
        model.set_attention_backend("_native_math")


def enable(config: Callable[[DiffusionPipeline, torch.nn.Module], object]):
    def put(pipe, folder):
        for model in models(pipe):
            model.enable_cache(config(pipe, model))

    return put


def first_block_cache(pipe, model):
    return FirstBlockCacheConfig(threshold=10.0)


def pyramid(pipe, model):
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def magnitude(pipe, model):
    return MagCacheConfig(
        threshold=10.0,
        max_skip_steps=1,
        retention_ratio=0.25,
        num_inference_steps=CACHED_STEPS,
        mag_ratios=torch.ones(CACHED_STEPS),
    )


def taylor(pipe, model):
    return TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=1,
        max_order=1,
        taylor_factors_dtype=torch.float32,
        # Its own patterns know no layer of Wan.
        cache_identifiers=[re.escape(path) for path in layers(model)],
    )


def cache_dit(pipe, folder):
    import cache_dit as package

    # It patches the class: one of the pipeline's own, which other tests do not see.
    pipe.__class__ = type(type(pipe).__name__, (type(pipe),), {})
    config = package.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1, residual_diff_threshold=10.0
    )
    package.enable_cache(pipe, cache_config=config)


def guide(**skip):
    """The hooks that a guider sets for its perturbed prediction: on the first block of each kind.

    diffusers has not registered most of its own processors, without which it refuses to set them;
    they are registered here, so that ours are compared with something."""

    def put(pipe, folder):
        for model in models(pipe):
            for layer in layers(model).values():
                kind = type(layer.processor)
                if kind not in AttentionProcessorRegistry._registry:
                    AttentionProcessorRegistry.register(kind, AttentionProcessorMetadata(skipped))
            for stack in {path.partition(".")[0] for path in layers(model)}:
                apply_layer_skip(model, LayerSkipConfig(indices=[0], fqn=stack, **skip))

    return put


def quantize(config: str):
    def put(pipe, folder):
        from torchao import quantization

        for model in models(pipe):
            quantization.quantize_(model, getattr(quantization, config)())

    return put


PAG = {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False}
FEATURES = {
    "compile": Feature(
        "regional `torch.compile`, one graph a block",
        compile_regionally,
        effect=False,
        tolerance=1e-4,
    ),
    "group-leaf": Feature("group offload, leaves", offload_groups("leaf_level"), effect=False),
    "group-block": Feature(
        "group offload, blocks", offload_groups("block_level", num_blocks_per_group=1), effect=False
    ),
    "model": Feature("model offload", offload_models, effect=False),
    "sequential": Feature("sequential offload", offload_sequentially, effect=False),
    "casting": Feature("layerwise casting to fp8", cast_layerwise),
    "lora": Feature("LoRA", load_lora),
    "fuse": Feature("`fuse_qkv_projections`", fuse_projections, effect=False, tolerance=1e-5),
    "backend": Feature("`set_attention_backend`", set_backend),
    "first-block": Feature("FirstBlockCache", enable(first_block_cache), steps=CACHED_STEPS),
    "pyramid": Feature("PAB", enable(pyramid), steps=CACHED_STEPS),
    "magnitude": Feature("MagCache", enable(magnitude), steps=CACHED_STEPS),
    "taylor": Feature("TaylorSeer", enable(taylor), steps=CACHED_STEPS),
    "cache-dit": Feature("cache-dit", cache_dit, package="cache_dit", steps=CACHED_STEPS),
    "layer-skip": Feature("SLG guider (block skipped)", guide()),
    "score-skip": Feature("PAG guider (scores skipped)", guide(**PAG)),
    "int8": Feature("torchao int8 weights", quantize("Int8WeightOnlyConfig"), package="torchao"),
    "fp8": Feature("torchao fp8 weights", quantize("Float8WeightOnlyConfig"), package="torchao"),
}
