"""What `inspect` says of a call, against token by token arithmetic in fp64, and of whole runs."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch.nn.functional import pad

from tests.tiny_models import WAN_CALL, tiny_wan
from vdit_sparse.call import Call
from vdit_sparse.eval.denoise import latents
from vdit_sparse.eval.inspect import Inspector, inspect
from vdit_sparse.eval.inspect_maps import place_of, raster_block, token_at
from vdit_sparse.grid import Grid
from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.method import Plan, SparseAttention
from vdit_sparse.methods import AdaSpaAttention, DraftAttention, RadialAttention
from vdit_sparse.orders import axis_order
from vdit_sparse.pipelines.attach import apply, summary

GRID = Grid(3, 6, 11, 25)
CALL = {name: value for name, value in WAN_CALL.items() if name != "prompt"}
DRAFT = DraftAttention(block=64, density=0.3, dense_steps=1)


@dataclass(frozen=True, kw_only=True)
class Planned(SparseAttention):
    """Runs a given plan."""

    given: Plan
    block: int = 64

    def plan(self, q, k, call):
        return self.given


def per_head(device):
    orders = torch.stack([axis_order(GRID, axes, device) for axes in ("HWF", "FHW")])
    return Plan(BlockMask.from_keep(some(2, 4, device), 64), orders)


def regions(device):
    """Columns 0 to 7 and 8 to 10 of each frame as blocks with masked slots; then text."""
    raster = torch.arange(GRID.video).view(GRID.frames, GRID.height, GRID.width)
    parts = [part.flatten(1) for part in raster.split(8, dim=2)]
    slots = torch.stack([pad(part, (0, 64 - part.shape[1]), value=-1) for part in parts], 1)
    text = torch.arange(GRID.video, GRID.tokens)
    order = torch.cat([slots.flatten(), text]).to(device)
    counts = [*(slots >= 0).sum(2).flatten(), *(len(x) for x in text.split(64))]
    valid = torch.tensor(counts, dtype=torch.int32, device=device)
    return Plan(BlockMask.from_keep(some(1, len(valid), device), 64, valid=valid), order)


def plain(device):
    return Plan(BlockMask.from_keep(some(2, 4, device), 64))


def some(heads, blocks, device):
    keep = torch.rand(heads, blocks, blocks, device=device) < 0.4
    return keep | torch.eye(blocks, dtype=torch.bool, device=device)


PLANS = {"plain": plain, "an order for each head": per_head, "regions with masked slots": regions}


def token_keep(plan, head, tokens, real):
    """Which token attends to which, bool `[real, real]`, one pair at a time."""
    order = plan.order if plan.order is not None else torch.arange(tokens)
    order = (order[head] if order.ndim == 2 else order).cpu()
    places = {int(token): place for place, token in enumerate(order) if token >= 0}
    mask = plan.mask
    keep = mask.keep()[0, head if mask.idx.shape[1] > 1 else 0].cpu()
    at = torch.tensor([places[token] for token in range(real)])
    return keep[at[:, None] // mask.block_q, at // mask.block_k]


def block_means(x, size):
    """Means over pairs of blocks of `size` tokens, the last ones ragged."""
    parts = [[y.mean() for y in rows.split(size, 1)] for rows in x.split(size)]
    return torch.tensor(parts)


def looked(plan, device, kv_len=None):
    q, k, v = torch.randn(3, 2, 2, GRID.tokens, 16, device=device) * 2
    call = Call(GRID, layer=0, layers=1, step=0, steps=1, memory={}, kv_len=kv_len)
    inspector = Inspector.around(Planned(given=plan))
    inspector(q, k, v, call)
    return q, k, v, inspector.seen[0]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", PLANS)
def test_a_call_is_measured_as_token_arithmetic_says(name, padded, device):
    plan = PLANS[name](device)
    real = GRID.tokens - (9 if padded else 0)
    kv_len = torch.tensor([GRID.tokens, real], dtype=torch.int32, device=device)
    q, k, v, look = looked(plan, device, kv_len if padded else None)
    q, k, v = (x[1, :, :real].double().cpu() for x in (q, k, v))
    weights = (q @ k.mT / 4).softmax(-1)
    block = plan.mask.block_q
    assert look.why is None and look.grid.tokens == real
    for head in range(2):
        keep = token_keep(plan, head, GRID.tokens, real)
        mine, map_ = weights[head], look.maps[head]
        assert look.recall[head] == pytest.approx(float((mine * keep).sum() / real), abs=2e-4)
        torch.testing.assert_close(
            map_.plan.raster_share().double(), block_means(keep.double(), block), rtol=0, atol=1e-6
        )
        sums = block_means(mine, block) * block_sizes(real, block)
        torch.testing.assert_close(map_.mass.double(), sums, rtol=0, atol=1e-3)
        # The second head of `per_head` has the order of the sequence.
        own = name != "plain" and (name, head) != ("an order for each head", 1)
        assert (map_.ordered is not None) == (map_.plan.order is not None) == own
        if map_.ordered is not None:
            counts = mine_counts(map_.plan)
            kept = (map_.ordered.double() * map_.plan.keep.cpu()).sum(1)
            assert float(kept @ counts) / real == pytest.approx(float(look.recall[head]), abs=1e-3)
        for token in (0, 77, real - 1):
            assert torch.equal(map_.plan.visited(token), keep[token])
        kept = mine.masked_fill(~keep, 0)
        sparse = kept / kept.sum(-1, keepdim=True) @ v[head]
        dense = mine @ v[head]
        wanted = float((sparse - dense).norm() / dense.norm())
        assert look.error[head] == pytest.approx(wanted, rel=5e-3)
        assert look.recall[head] <= look.best[head] + 1e-6 <= 1 + 1e-5


def mine_counts(plan):
    """Tokens of each block of a plan, fp64."""
    blocks = range(plan.keep.shape[0])
    return torch.tensor([len(plan.block_tokens(block)) for block in blocks], dtype=torch.float64)


def block_sizes(tokens, size):
    return torch.tensor([len(x) for x in torch.arange(tokens).split(size)])


def test_best_is_the_mass_of_the_heaviest_blocks_of_each_row(device):
    _, _, _, look = looked(plain(device), device)
    for head, map_ in look.maps.items():
        rows = block_sizes(GRID.tokens, 64) / GRID.tokens
        kept = map_.plan.keep.sum(1)
        best = sum(
            float(row.sort(descending=True).values[:count].sum() * share)
            for row, count, share in zip(map_.mass.double(), kept, rows, strict=True)
        )
        assert look.best[head] == pytest.approx(best, abs=2e-3)
        assert look.density[head] == pytest.approx(float(map_.plan.keep.float().mean()))


def test_tokens_of_a_plan_block(device):
    _, _, _, look = looked(regions(device), device)
    plan = look.maps[0].plan
    together = torch.cat([plan.block_tokens(block) for block in range(plan.keep.shape[1])])
    assert sorted(together.tolist()) == list(range(GRID.tokens))
    # The second region of a frame: its columns 8 to 10, all six rows.
    places = [place_of(GRID, token) for token in plan.block_tokens(1).tolist()]
    assert places == [(0, row, column) for row in range(6) for column in (8, 9, 10)]
    assert _tokens(plain(device), device).tolist() == list(range(192, GRID.tokens))


def _tokens(plan, device):
    return looked(plan, device)[3].maps[1].plan.block_tokens(3)


def test_places_and_blocks():
    assert place_of(GRID, 66 + 11 + 3) == (1, 1, 3)
    assert place_of(GRID, GRID.video) is None
    assert all(token_at(GRID, *place_of(GRID, token)) == token for token in range(GRID.video))
    assert raster_block(GRID, 3, 64) == range(192, 223)
    for wrong in (lambda: place_of(GRID, 223), lambda: token_at(GRID, 3, 0, 0)):
        with pytest.raises(ValueError, match="0 to 222|no place"):
            wrong()
    with pytest.raises(ValueError, match="no block 4"):
        raster_block(GRID, 4, 64)


def test_a_run_is_the_methods_own_and_says_what_it_kept(device):
    pipe = tiny_wan().to(device)
    seen = []
    found = inspect(
        pipe, DRAFT, "a cat", 3, heads=(1,), on_step=lambda *at: seen.append(at), **CALL
    )
    assert summary(pipe).entries == () and seen == [(1, 3), (2, 3), (3, 3)]
    apply(pipe, DRAFT)
    latents(pipe, {**CALL, "prompt": "a cat", "seed": 3})
    entries = summary(pipe).entries
    for step in range(3):
        values = [entry.density for entry in entries if entry.step == step]
        assert found.densities[step] == pytest.approx(sum(values) / len(values))
    assert (found.layers, found.heads, found.steps, found.measured) == (2, 2, 3, (0, 1, 2))
    assert [look.why for look in found.looks] == ["dense_steps"] * 2 + [None] * 4
    for name in ("density", "recall", "best"):
        assert (found.table(name)[0] == 1).all() and (found.table(name)[1:] < 1).all()
    # The dense step is as good as dense, and the first call of a step is the prompt's.
    assert found.table("error")[0].max() < 2e-3 < found.table("error")[1:].min()
    first = [entry for entry in entries if entry.branch == entries[0].branch and not entry.dense]
    for entry in first:
        assert found.look(entry.step, entry.layer).density.mean() == pytest.approx(entry.density)
    assert set(found.look(2, 0).maps) == {1}


def test_looking_does_not_change_the_run(device):
    pipe = tiny_wan().to(device)
    taken = []

    def keep(pipe, step, timestep, tensors):
        taken.append(tensors["latents"].clone())
        return tensors

    inspector = Inspector.around(DRAFT, steps=(1,))
    for method in (inspector, replace(inspector, steps=(), seen=[])):
        apply(pipe, method)
        latents(pipe, {**CALL, "prompt": "a", "seed": 0, "callback_on_step_end": keep})
    assert torch.equal(taken[2], taken[5])
    apply(pipe, DRAFT)
    latents(pipe, {**CALL, "prompt": "a", "seed": 0, "callback_on_step_end": keep})
    torch.testing.assert_close(taken[2], taken[8], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("refresh", ["each", 2])
def test_the_plan_shown_is_the_one_that_ran(refresh, device):
    ran = []

    @dataclass(frozen=True, kw_only=True)
    class Watched(DraftAttention):
        def current_plan(self, q, k, call):
            plan = super().current_plan(q, k, call)
            ran.append((call.step, call.layer, plan.mask.keep()[-1].cpu()))
            return plan

    method = Watched(block=64, density=0.3, dense_steps=0, refresh=refresh)
    found = inspect(tiny_wan().to(device), method, "a", **{**CALL, "guidance_scale": 1.0})
    assert len(ran) == len(found.looks) == 6
    for step, layer, keep in ran:
        maps = found.look(step, layer).maps
        assert torch.equal(torch.stack([maps[head].plan.keep for head in (0, 1)]), keep)


def test_a_plan_that_the_run_itself_changes_is_asked_for_in_time(device):
    """As of TunedAttention, which keeps less after the call in which it has searched."""

    @dataclass(frozen=True, kw_only=True)
    class Narrowing(SparseAttention):
        block: int = 64

        def plan(self, q, k, call):
            left = call.memory.setdefault("state", [5])[0]
            keep = torch.arange(5, device=q.device) < left
            return Plan(BlockMask.from_keep(keep.expand(5, 5), 64))

        def attend(self, q, k, v, call):
            out = super().attend(q, k, v, call)
            call.memory["state"][0] -= 2
            return out

    found = inspect(tiny_wan().to(device), Narrowing(), "a", **{**CALL, "guidance_scale": 1.0})
    assert found.table("density").mean((1, 2)).tolist() == pytest.approx([1, 0.6, 0.2])
    assert list(found.densities.values()) == pytest.approx([1, 0.6, 0.2])


def test_a_search_counts_as_dense(device):
    method = AdaSpaAttention(density=0.3, dense_steps=0, refresh=(0,))
    found = inspect(tiny_wan().to(device), method, "a", layers=(), **CALL)
    assert [look.why for look in found.looks] == ["search"] * 2 + [None] * 4
    assert (found.table("recall")[0] == 1).all() and found.densities[1] < 0.5
    assert not any(look.maps for look in found.looks)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"layers": (2,)}, "layers must be from 0 to 1, got 2"),
        ({"steps": (1, 3)}, "steps must be from 0 to 2, got 3"),
        ({"heads": (-1,)}, "heads must be from 0 to 1, got -1"),
        ({"most_bytes": 100}, "more than 100 bytes"),
    ],
)
def test_what_the_run_does_not_have_is_refused(chosen, message):
    pipe = tiny_wan()
    with pytest.raises(ValueError, match=message):
        inspect(pipe, RadialAttention(block=64), "a", **chosen, **CALL)
    assert summary(pipe).method.startswith("none")


def test_only_what_was_measured_can_be_asked_for():
    found = inspect(tiny_wan(), RadialAttention(block=64), "a", steps=(1,), **CALL)
    assert found.measured == (1,) and found.table("best").shape == (1, 2, 2)
    assert set(found.densities) == {0, 1, 2}
    with pytest.raises(KeyError, match="Step 0, layer 0"):
        found.look(0, 0)
    with pytest.raises(ValueError, match="no table 'speed'"):
        found.table("speed")
