"""One video in several processes equals one process: tokens split, guidance branches shared."""

from importlib import import_module

import pytest
import torch

from tests.methods.cases import CALIBRATED, call_at, ready
from tests.pipelines.parallel_processes import in_processes
from tests.tiny_models.catalogue import TINY
from vdit_sparse import METHODS, cfg_parallel, context_parallel, context_parallel_plan
from vdit_sparse.call import Heads
from vdit_sparse.grid import Grid
from vdit_sparse.pipelines.families import FAMILIES

# Tokens of the parts, heads, batch rows: even, uneven, joint.
EXCHANGES = [((8,), 4, 1), ((8,), 2, 2), ((7,), 3, 1), ((6, 10), 2, 1), ((5, 9), 3, 2)]
# Every family that can be split, in the form with the most traps.
SPLIT = [
    ("split", "wan", tuple(METHODS)),
    ("split", "wan-ti2v", ()),
    ("split", "flux-kontext", ("paro",)),
    ("split", "flux2-dev", ("sparse-vdit",)),
    ("split", "qwen-image", ("adaspa",), "batch", True),
    ("split", "hunyuan-video", ("adaspa", "sparse-vdit"), "batch"),
    ("split", "cogvideox-1.5", ("paro", "radial")),
    ("split", "ltx-video-i2v", ("radial",)),
    ("split", "ltx-video-conditions", ("adaspa",), "", True),
    ("split", "ltx2-i2v", ("rettention",)),
    ("split", "ltx2.3", ("paro",)),
]
GUIDED = [("guided", name) for name in ("wan", "wan-two-experts", "flux-guided", "ltx-video")]
REST = [
    ("wrong_length",),
    ("too_few_heads",),
    ("mesh_of_two",),
    ("unnamed_branches",),
    ("method_first",),
    ("split_by_hand",),
    ("ring",),
    ("odd_prompt",),
    ("removed_without_stock",),
]
SAID = {
    "wrong_length": "Expected 4 tokens in process",
    "too_few_heads": "1 attention heads do not go round 2 processes",
    "mesh_of_two": "take 2 times at least 2 processes, got 2 times 1: start 4",
    "unnamed_branches": "was called for one that has no name",
    "odd_prompt": "23 tokens do not divide among 2 processes: use ulysses_anything",
    "removed_without_stock": "its stock attention cannot run: load it anew",
}
ENTRIES = [
    *("wan", "wan-two-experts", "flux", "flux-kontext", "flux2-dev", "flux2-klein"),
    *("qwen-image", "qwen-image-edit", "hunyuan-video", "hunyuan-video-latent-concat"),
    *("cogvideox", "cogvideox-1.5", "cogvideox-i2v", "ltx-video", "ltx-video-i2v"),
    *("ltx-video-conditions", "ltx2", "ltx2.3", "ltx2-i2v", "ltx2-references"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    """What each of two processes found, by case."""
    cases = [*[("exchange", *case) for case in EXCHANGES], *SPLIT, *GUIDED, *REST]
    return in_processes(cases, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("case", EXCHANGES, ids=str)
def test_tokens_arrive_in_the_models_order_and_come_back(found, case):
    assert [each["exchange", *case] for each in found] == [True, True]


@pytest.mark.parametrize("case", SPLIT, ids=lambda case: case[1])
def test_a_split_video_is_the_same_dense_and_by_every_method(found, case):
    check_split(found, case)


@pytest.mark.parametrize("case", GUIDED, ids=lambda case: case[1])
def test_shared_guidance_is_the_same_with_fewer_calls(found, case):
    for each in found:
        result = each[case]
        assert isinstance(result, dict), result
        assert result["apart"] < 2e-5 < result["guidance"]
        shared, before = result["calls"]
        # All of the first step, then one branch; a halved batch has as many calls as a whole one.
        assert shared < before or (case[1] == "ltx-video" and shared == before)


@pytest.mark.parametrize("name", SAID)
def test_what_cannot_be_is_refused_with_the_reason(found, name):
    for each in found:
        assert SAID[name] in each[name,]


def test_ring_attention_is_refused_before_and_after_the_method(found):
    for each in found:
        for said in each["ring",]:
            assert "a block mask goes over all of them; use ulysses_degree" in said


def test_a_method_may_come_before_the_split_and_go(found):
    for each in found:
        assert max(each["method_first",].values()) < 2e-5


def test_enable_parallelism_after_the_method_asks_for_the_method_again(found):
    for each in found:
        said, apart = each["split_by_hand",]
        assert "enable_parallelism came after the method" in said
        assert apart < 2e-5


def test_without_processes_both_say_what_to_do():
    for split in (context_parallel, cfg_parallel):
        with pytest.raises(RuntimeError, match="run under torchrun"):
            split(TINY["wan"]().pipe)


def test_a_model_that_cannot_be_split_says_why():
    with pytest.raises(ValueError, match="neither diffusers nor vdit_sparse has a plan"):
        context_parallel_plan(TINY["mochi"]().pipe.transformer)
    with pytest.raises(ValueError, match="first frame by their number"):
        context_parallel_plan(TINY["hunyuan-video-token-replace"]().pipe.transformer)


class Second(Heads):
    """The second half of a layer's heads, in one process."""

    def total(self, own):
        return 2 * own

    def own(self, x, dim):
        return x.chunk(2, dim)[1]


@pytest.mark.parametrize("name", CALIBRATED)
def test_calibrated_plans_are_those_of_the_calls_heads(name, device):
    grid = Grid(4, 8, 16)
    whole = call_at(name, grid, heads=4)
    half = call_at(name, grid, heads=4)
    object.__setattr__(half, "heads", Second())
    method, q = ready(name, block=64), torch.randn(1, 4, grid.tokens, 16, device=device)
    expected, plan = method.plan(q, q, whole), method.plan(q[:, 2:], q[:, 2:], half)
    assert torch.equal(plan.mask.keep(), expected.mask.keep()[:, 2:])
    assert torch.equal(plan.order, expected.order[2:])


@pytest.mark.slow
def test_every_form_of_model(tmp_path):
    cases = [("split", name, ("adaspa", "draft"), "", True) for name in ENTRIES]
    found = in_processes(cases, tmp_path)
    for case in cases:
        check_split(found, case)


@pytest.mark.slow
def test_every_method_on_joint_models(tmp_path):
    joint = ("flux", "flux2-klein", "qwen-image", "hunyuan-video", "cogvideox-i2v")
    cases = [
        ("split", name, tuple(sorted(METHODS.keys() - TINY[name]().refused.keys())), "", True)
        for name in joint
    ]
    found = in_processes(cases, tmp_path)
    for case in cases:
        check_split(found, case)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan", "flux-guided", "ltx-video", "cogvideox"])
def test_guidance_and_tokens_over_four_processes(name, tmp_path):
    for each in in_processes([("both_kinds", name)], tmp_path, count=4):
        assert each["both_kinds", name] < 2e-5


def test_every_family_that_can_be_split_is_tested():
    families = {kind: import_module(home).FAMILY for kind, home in FAMILIES.items()}
    tested = {type(TINY[case[1]]().pipe.transformer).__name__ for case in SPLIT}
    assert tested == {kind for kind, family in families.items() if family.parallel}


def check_split(found: list[dict], case: tuple) -> None:
    for each in found:
        assert isinstance(each[case], dict), each[case]
        # Products of half as many rows may be summed in another order.
        assert each[case]["dense"][0] <= 5e-6, case
    for name in case[2]:
        aparts, from_dense, densities, whole = zip(
            *(each[case][name] for each in found), strict=True
        )
        assert max(aparts) <= TINY[case[1]]().tolerance, name
        assert min(from_dense) > 1e-4 and whole[0] < 1, name
        # Heads have densities of their own; the processes have as many each.
        assert sum(densities) / len(found) == pytest.approx(whole[0], abs=1e-6), name
