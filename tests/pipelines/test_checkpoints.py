"""The table of published checkpoints, and what a transformer costs by its modules."""

from importlib import import_module

import pytest
import torch

from tests.tiny_models.catalogue import TINY
from vdit_sparse.grid import Grid
from vdit_sparse.pipelines.anatomy import BLOCK, anatomy_of, meta_transformer
from vdit_sparse.pipelines.checkpoints import (
    GUIDANCE,
    Checkpoint,
    checkpoint_like,
    checkpoint_of,
    checkpoints,
)
from vdit_sparse.pipelines.families import FAMILIES, family_of
from vdit_sparse.pipelines.load import PIPELINES

ALL = {one.name: one for one in checkpoints()}
# Building all of them takes half a minute.
QUICK = ("wan2.1-t2v-1.3b", "flux2-klein-4b", "cogvideox1.5-5b", "ltx-video-2b", "sd3.5-medium")

# ../shared/diffusers.md 1.3: tokens of a video in pixels, and text in the sequence.
TOKENS = {
    ("wan2.1-t2v-14b", 720, 1280, 81): (75_600, 0),
    ("wan2.1-t2v-1.3b", 480, 832, 81): (32_760, 0),
    ("wan2.2-ti2v-5b", 704, 1280, 121): (27_280, 0),
    ("skyreels2-df-1.3b", 544, 960, 97): (51_000, 0),
    ("hunyuanvideo", 720, 1280, 129): (118_800, 256),
    ("hunyuanvideo", 544, 960, 129): (67_320, 256),
    ("hunyuanvideo1.5-720p-t2v", 720, 1280, 121): (111_600, 1985),
    ("cogvideox-2b", 480, 720, 49): (17_550, 226),
    ("cogvideox1.5-5b", 768, 1360, 81): (44_880, 226),
    ("mochi-1", 480, 848, 163): (44_520, 256),
    ("mochi-1", 480, 848, 19): (6_360, 256),
    ("ltx-video-2b", 512, 704, 161): (7_392, 0),
    ("ltx-video-13b", 704, 1216, 121): (13_376, 0),
    ("ltx2", 1024, 1536, 121): (24_576, 0),
    ("allegro", 720, 1280, 88): (79_200, 0),
    ("cosmos1-7b", 704, 1280, 121): (56_320, 0),
    ("cosmos2-v2w-2b", 704, 1280, 93): (84_480, 0),
    ("cosmos2-t2i-2b", 768, 1360, 1): (4_080, 0),
    ("kandinsky5-lite-t2v", 512, 768, 121): (47_616, 0),
    ("flux1-dev", 2048, 2048, 1): (16_384, 512),
    ("qwen-image", 1328, 1328, 1): (6_889, 512),
}


@pytest.mark.parametrize("case", TOKENS, ids=lambda case: "-".join(map(str, case)))
def test_tokens_are_those_of_the_models(case):
    name, *video = case
    grid = ALL[name].grid(*video)
    assert (grid.video, grid.text) == TOKENS[case]


def test_the_table_is_whole():
    assert len(ALL) == len(checkpoints()) and set(FAMILIES) >= {x.transformer for x in ALL.values()}
    presets = {kind: set() for kind in FAMILIES}
    for one in ALL.values():
        assert one.pipeline in PIPELINES and one.guidance in GUIDANCE, one.name
        assert one.hub.count("/") == 1 and one.billions > 0 and one.encoders > 0, one.name
        assert one.grid(*one.size, one.frames).tokens > 0
        presets[one.transformer] |= set(one.presets)
    for kind, home in FAMILIES.items():
        there = {name for name in import_module(home).FAMILY.presets if "-mini" not in name}
        assert presets[kind] == there, kind


# One name of each configuration.
BUILT = {f"{one.transformer} {dict(one.config)}": name for name, one in reversed(ALL.items())}
LONG = [pytest.param(x, marks=pytest.mark.slow) for x in BUILT.values() if x not in QUICK]


@pytest.mark.parametrize("name", [*QUICK, *LONG])
def test_configurations_are_those_of_the_published_models(name):
    one = ALL[name]
    transformer = meta_transformer(one)
    found = anatomy_of(transformer, one.joint)
    assert (found.layers, found.heads, found.head_dim) == (one.layers, one.heads, one.head_dim)
    assert found.parameters / 1e9 == pytest.approx(one.billions, rel=0.04)


def test_sizes_that_a_model_does_not_take_name_the_nearest():
    wan, ltx, allegro = (ALL[name] for name in ("wan2.1-t2v-14b", "ltx2", "allegro"))
    for one, video, message in (
        (wan, (710, 1280, 81), "height must be a multiple of 16 .*710; nearest: 704 and 720"),
        (wan, (720, 8, 81), "width must be .* got 8; nearest: 16"),
        (wan, (720, 1280, 80), "1 more than a multiple of 4, got 80; nearest: 77 and 81"),
        (wan, (720, 1280, 0), "got 0; nearest: 1 and 5"),
        (ltx, (720, 1280, 121), "multiple of 32 pixels, got 720; nearest: 704 and 736"),
        (ltx, (704, 1280, 120), "nearest: 113 and 121"),
        (allegro, (720, 1280, 89), "frames must be a multiple of 4, got 89; nearest: 88 and 92"),
        (ALL["flux1-dev"], (1024, 1024, 5), "makes images: frames must be 1"),
    ):
        with pytest.raises(ValueError, match=message):
            one.latent(*video)
    with pytest.raises(ValueError, match="height .*width .*frames"):
        wan.latent(1, 1, 2)


def test_checkpoints_have_two_names():
    by_name = checkpoint_of("wan2.2-t2v-a14b")
    assert by_name is checkpoint_of("Wan-AI/Wan2.2-T2V-A14B-Diffusers") and by_name.experts == 2
    assert checkpoint_of("wan3") is None


def test_a_folder_is_read_by_its_configurations():
    config = {"patch_size": [1, 2, 2], "num_layers": 3, "in_channels": 48}
    vae = {"scale_factor_spatial": 16, "scale_factor_temporal": 4}
    found = checkpoint_like("WanTransformer3DModel", config, vae)
    assert found.pixels == 32 and found.temporal == 4 and found.config["num_layers"] == 3
    assert not found.name and not found.presets
    flux = checkpoint_like("FluxTransformer2DModel", {"patch_size": 1}, {})
    assert flux.pixels == 16 and flux.joint
    cosmos = {"temporal_compression_ratio": 8, "spatial_compression_ratio": 8}
    assert checkpoint_like("CosmosTransformer3DModel", {}, cosmos).temporal == 8
    with pytest.raises(ValueError, match="Nothing is known of UNet; known: Allegro"):
        checkpoint_like("UNet", {}, {})


class Counted:
    """Counts what the linear layers of a transformer's blocks do in its first call, and keeps the
    grid of that call."""

    def __init__(self, transformer):
        self.flops, self.calls, self.grid, self.family = 0, 0, None, family_of(transformer)
        self.hooks = [transformer.register_forward_pre_hook(self.starts, with_kwargs=True)]
        for name, module in transformer.named_modules():
            if isinstance(module, torch.nn.Linear) and BLOCK.search(f"{name}."):
                self.hooks.append(module.register_forward_hook(self.linear))

    def starts(self, transformer, arguments, keywords):
        self.calls += 1
        if self.calls == 1:
            self.rows = keywords["hidden_states"].shape[0]
            self.grid = self.family.grid(transformer, keywords)
            self.text = keywords["encoder_hidden_states"].shape[1]

    def linear(self, module, inputs, output):
        if self.calls == 1:
            self.flops += 2 * inputs[0].numel() * module.out_features


@pytest.mark.parametrize("name", ["wan", "hunyuan-video", "cogvideox", "flux", "ltx-video"])
def test_linear_layers_are_counted_as_they_run(name):
    """Within a tenth of what hooks count, of models with few features, where names matter most."""
    tiny = TINY[name]()
    counted = Counted(tiny.pipe.transformer)
    tiny.pipe(**tiny.call)
    found = anatomy_of(tiny.pipe.transformer, joint=counted.grid.text > 0)
    rest = found.rest(counted.grid, counted.text)
    if not counted.grid.text:
        rest -= 4.0 * found.layers * counted.grid.video * counted.text * found.inner
    assert counted.rows * rest == pytest.approx(counted.flops, rel=0.1)


def test_weights_and_attention_by_hand():
    one = Checkpoint(
        transformer="WanTransformer3DModel",
        config={"num_attention_heads": 2, "attention_head_dim": 8, "ffn_dim": 24, "num_layers": 3},
        layers=3,
        heads=2,
    )
    model = meta_transformer(one)
    found = anatomy_of(model, joint=False)
    assert (found.layers, found.heads, found.head_dim, found.widest) == (3, 2, 8, 24)
    # q, k, v, o and cross-attention's q, o; both sides of the feed-forward.
    assert found.video == 3 * (6 * 16 * 16 + 2 * 16 * 24) and found.text == 3 * 2 * 16 * 16
    assert found.attention(Grid(2, 3, 5)) == 4 * 3 * 30**2 * 16
    kept = sum(
        x.numel()
        for name, x in model.named_parameters()
        if {"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"} & set(name.split("."))
    )
    assert found.kept == kept > 0
    assert found.weights(2) == 2 * found.parameters + 2 * kept
    with pytest.raises(ValueError, match="does not take its config: .*wrong"):
        meta_transformer(
            Checkpoint(transformer="WanTransformer3DModel", config={"wrong": 1}, layers=1, heads=1)
        )
