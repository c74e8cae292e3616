"""diffusers' guiders: every guidance branch has its own state, also where the pipeline does not
name it, and where a guider leaves branches out of some steps."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from diffusers import (
    ClassifierFreeGuidance,
    DiffusionPipeline,
    LayerSkipConfig,
    ModularPipeline,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    WanBlocks,
)
from diffusers.hooks.layer_skip import apply_layer_skip

from tests.tiny_models.catalogue import TINY
from tests.tiny_models.parts import Tiny
from vdit_sparse import AdaSpaAttention, RettentionAttention, apply, summary

STEPS = 5
DENSE = AdaSpaAttention(dense_steps=STEPS)
# What they keep from step to step: the places of blocks; rows' shares, and what a band drops.
KEEPING = {
    "adaspa": AdaSpaAttention(block=64, density=0.3, dense_steps=0, dense_search=False),
    "rettention": RettentionAttention(block=64, dense_steps=0, density=0.03),
}


class Guided(NamedTuple):
    """make: the guider. skip: what its third call leaves out of the layers, None where there is
    none. named: the branches of HunyuanVideo 1.5, each with its steps."""

    make: Callable
    skip: LayerSkipConfig | None
    named: dict[str, range]


def skipping(blocks: str, **what) -> LayerSkipConfig:
    return LayerSkipConfig([1], fqn=blocks, **what)


ATTENTION = {"skip_attention": True, "skip_ff": False, "skip_attention_scores": False}
SCORES = {"skip_attention": False, "skip_ff": False, "skip_attention_scores": True}
GUIDED = {
    "classifier-free": Guided(
        lambda blocks: ClassifierFreeGuidance(guidance_scale=2.0, start=0.4),
        None,
        {"pred_cond": range(STEPS), "pred_uncond": range(2, STEPS)},
    ),
    "attention skipped": Guided(
        lambda blocks: SkipLayerGuidance(
            guidance_scale=2.0,
            skip_layer_guidance_scale=1.5,
            skip_layer_guidance_start=0.0,
            skip_layer_guidance_stop=0.8,
            skip_layer_config=skipping(blocks, **ATTENTION),
        ),
        ATTENTION,
        {"pred_cond": range(STEPS), "pred_uncond": range(STEPS), "pred_cond_skip": range(1, 4)},
    ),
    "scores skipped": Guided(
        lambda blocks: PerturbedAttentionGuidance(
            guidance_scale=2.0,
            perturbed_guidance_scale=1.5,
            perturbed_guidance_start=0.0,
            perturbed_guidance_stop=0.8,
            perturbed_guidance_config=skipping(blocks, **SCORES),
        ),
        SCORES,
        {"pred_cond": range(STEPS), "pred_uncond": range(STEPS), "pred_cond_skip": range(1, 4)},
    ),
}


class Recorded(NamedTuple):
    """A call of the transformer in a run."""

    branch: str
    step: int
    arguments: dict
    out: torch.Tensor


def hunyuan(guider) -> Tiny:
    tiny = TINY["hunyuan-video-1.5"]()
    tiny.pipe.guider = guider
    return tiny


def modular(guider) -> tuple[ModularPipeline, Tiny]:
    """Wan as a modular pipeline, which names no branches, up to its latents."""
    tiny = TINY["wan"]()
    blocks = WanBlocks()
    blocks.sub_blocks.pop("decode")
    pipe = blocks.init_pipeline()
    parts = {name: part for name, part in tiny.pipe.components.items() if name in pipe.components}
    pipe.update_components(**parts, guider=guider)
    pipe.set_progress_bar_config(disable=True)
    return pipe, tiny


@torch.no_grad()
def run(pipe: DiffusionPipeline | ModularPipeline, tiny: Tiny) -> torch.Tensor:
    call = {
        **tiny.call,
        "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(0),
    }
    if isinstance(pipe, DiffusionPipeline):
        return torch.stack(list(pipe(**call)[0]))
    names = ("prompt", "negative_prompt", "height", "width", "num_frames", "num_inference_steps")
    call = {name: call[name] for name in (*names, "generator")}
    return pipe(**call, output="latents")


def recorded(pipe, tiny: Tiny) -> list[Recorded]:
    """The calls of a run with the method that is on."""
    calls = []

    def keep(module, args, kwargs, out):
        calls.append((copy.deepcopy(kwargs), out[0].clone()))

    handle = pipe.transformer.register_forward_hook(keep, with_kwargs=True)
    run(pipe, tiny)
    handle.remove()
    places = dict.fromkeys((entry.branch, entry.step) for entry in summary(pipe).entries)
    return [Recorded(*place, *call) for place, call in zip(places, calls, strict=True)]


@torch.no_grad()
def check_alone(model: torch.nn.Module, method, calls: list[Recorded]) -> None:
    """A branch by itself, with the method's state afresh, gives what it gave in the run."""
    apply(model, method)
    for call in calls:
        with model.cache_context("alone", step_index=call.step, num_inference_steps=STEPS):
            out = model(**call.arguments)[0]
        assert torch.equal(out, call.out), (call.branch, call.step)


def check_branches(pipe, method, calls: list[Recorded], skipped: str, skip, blocks: str) -> None:
    names = dict.fromkeys(call.branch for call in calls)
    for branch in sorted(names, key=lambda name: name == skipped):  # the hooks stay
        if branch == skipped:
            apply_layer_skip(pipe.transformer, skipping(blocks, **skip))
        check_alone(pipe.transformer, method, [x for x in calls if x.branch == branch])


@pytest.mark.parametrize("method", KEEPING)
@pytest.mark.parametrize("name", GUIDED)
def test_branches_of_a_guider_share_no_state(name, method):
    guided = GUIDED[name]
    tiny = hunyuan(guided.make("transformer_blocks"))
    apply(tiny.pipe, KEEPING[method])
    calls = recorded(tiny.pipe, tiny)
    done = summary(tiny.pipe)
    steps = {branch: [x.step for x in calls if x.branch == branch] for branch in guided.named}
    assert steps == {branch: list(steps) for branch, steps in guided.named.items()}
    assert len(calls) == sum(map(len, steps.values())) and 0 < done.sparse_density < 1
    check_branches(
        tiny.pipe, KEEPING[method], calls, "pred_cond_skip", guided.skip, "transformer_blocks"
    )


def late(blocks: str) -> SkipLayerGuidance:
    """Without the prompt left out at first: two calls of one step are others than of the next."""
    options = {"skip_layer_config": skipping(blocks), "skip_layer_guidance_start": 0.0}
    return SkipLayerGuidance(2.0, 1.5, skip_layer_guidance_stop=0.6, start=0.4, **options)


def test_a_modular_pipeline_is_bit_equal_when_dense_and_knows_its_steps():
    pipe, tiny = modular(late("blocks"))
    stock = run(pipe, tiny)
    apply(pipe, DENSE)
    assert torch.equal(run(pipe, tiny), stock)
    apply(pipe, AdaSpaAttention(block=64, dense_steps=1, last_dense_steps=1))
    run(pipe, tiny)
    done = summary(pipe)
    assert done.steps == STEPS
    assert {entry.step for entry in done.entries if entry.dense} == {0, STEPS - 1}


@pytest.mark.parametrize("method", KEEPING)
def test_branches_that_a_modular_pipeline_does_not_name_share_no_state(method):
    pipe, tiny = modular(late("blocks"))
    apply(pipe, KEEPING[method])
    calls = recorded(pipe, tiny)
    assert [(x.step, x.branch) for x in calls] == [
        (0, "call 0"),
        (1, "call 0"),
        (1, "call 1 of 2, prompt only"),
        (2, "call 0"),
        (2, "call 1 of 3"),
        (2, "call 2 of 3"),
        (3, "call 0"),
        (3, "call 1 of 2"),
        (4, "call 0"),
        (4, "call 1 of 2"),
    ]
    whole = {"skip_attention": True, "skip_ff": True, "skip_attention_scores": False}
    check_branches(pipe, KEEPING[method], calls, "call 2 of 3", whole, "blocks")
