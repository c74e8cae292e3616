"""The method that runs a tuned file: against masks in fp64, and what was predicted."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vdit_sparse.calibration import Calibration
from vdit_sparse.call import Call, Note, Origin
from vdit_sparse.eval.tune_allocate import Losses, allocate
from vdit_sparse.eval.tune_record import TuneSearch
from vdit_sparse.grid import Grid
from vdit_sparse.tuned import TunedAttention, heaviest
from vdit_sparse.tuned_table import NOTHING

BLOCK, STEPS, HEADS = 64, 4, 3
GRIDS = [Grid(4, 8, 8), Grid(3, 9, 13), Grid(3, 9, 13, 17)]
DENSITIES = [0.0, 0.2, 0.5]
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)


def table(**changes) -> dict:
    """Head 0 is dense once, head 1 at steps 0 and 2, head 2 always; each with its own order."""
    dense = torch.tensor([[1, 1, 1], [0, 0, 1], [0, 1, 1], [0, 0, 1]], dtype=torch.uint8)
    level = torch.tensor([[1, 2, -1], [1, 2, -1], [1, 0, -1], [1, 0, -1]], dtype=torch.int8)
    share = torch.tensor([[0, 1, 0], [0.0, 1, 0], [0.5, 1, 0], [1, 1, 0]], dtype=torch.float16)
    found = {
        "step": torch.arange(STEPS, dtype=torch.int16),
        "dense": dense[:, None],
        "level": level[:, None],
        "share": share[:, None],
        "order": torch.tensor([[0, 2, 4]], dtype=torch.int8),
    }
    return {**found, **changes}


def calibration(grid, tensors=None) -> Calibration:
    tensors = {f"transformer.{name}": x for name, x in (tensors or table()).items()}
    fields = {"block": BLOCK, "densities": DENSITIES}
    about = ("made up", "TunedAttention", fields, Origin(), grid, 1, STEPS)
    return Calibration(*about, prompts=(), seeds=(), versions={}, tensors=tensors)


def call_at(grid, step, memory, **more) -> Call:
    return Call(grid, layer=0, layers=1, step=step, steps=STEPS, memory=memory, **more)


def inputs(grid, device, batch=2):
    """q, k, v of each step: each a little different from those before."""
    first = torch.randn(3, batch, HEADS, grid.tokens, 16, device=device)
    return [first + 0.3 * i * torch.randn_like(first) for i in range(STEPS)]


def run(grid, qkv, tensors=None, **more):
    memory = {"calibration": calibration(grid, tensors)}
    outs, notes = [], []
    for step, each in enumerate(qkv):
        notes.append(Note())
        call = call_at(grid, step, memory, note=notes[-1], **more)
        outs.append(TunedAttention()(*each, call))
    return outs, notes, memory["state"]


def exact(q, k, v):
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double())


@each_grid
def test_dense_heads_are_dense_and_density_counts_all(grid, device):
    qkv = inputs(grid, device)
    outs, notes, _ = run(grid, qkv)
    for step, (out, each) in enumerate(zip(outs, qkv, strict=True)):
        dense = [0, 1, 2] if step == 0 else [1, 2] if step == 2 else [2]
        expected = exact(*each)[:, dense].float()
        torch.testing.assert_close(out[:, dense], expected, atol=1e-5, rtol=1e-5)
    assert float(notes[0].density) == 1 and notes[0].searched
    assert 1 / 3 < float(notes[1].density) < float(notes[2].density) < 1
    assert [note.searched for note in notes] == [True, False, True, False]


@each_grid
def test_between_dense_steps_a_head_is_blocks_and_what_is_left(grid, device):
    """In fp64, by masks of tokens, for head 1 at step 1: level 2, all of the rest."""
    qkv = inputs(grid, device)
    outs, _, state = run(grid, qkv[:2])
    plan = state.plan(call_at(grid, 1, {}))
    slot = plan.order[1].argsort()
    visible = plan.mask.token_mask(grid.tokens, grid.tokens)[:, 1][:, slot][:, :, slot]
    assert 0.4 < float(visible.double().mean()) < 1
    full, band, lse = [], [], []
    for q, k, v in (x[:, :, 1].double() for x in qkv[:2]):
        scores = q @ k.mT / q.shape[-1] ** 0.5
        kept = scores.masked_fill(~visible, -torch.inf)
        full.append(scores.softmax(-1) @ v)
        band.append(kept.softmax(-1) @ v)
        lse.append((kept.logsumexp(-1) - scores.logsumexp(-1)).exp()[..., None])
    expected = lse[0] * band[1] + full[0] - lse[0] * band[0]
    torch.testing.assert_close(outs[1][:, 1].double(), expected, atol=1e-5, rtol=1e-5)


def test_with_the_same_inputs_all_that_is_left_makes_it_dense(device):
    grid = GRIDS[2]
    same = inputs(grid, device)[:1] * STEPS
    ones = table()
    ones["share"] = torch.ones_like(ones["share"])
    for out in run(grid, same, ones)[0]:
        torch.testing.assert_close(out, exact(*same[0]).float(), atol=1e-4, rtol=1e-4)


@each_grid
def test_the_error_is_the_predicted_one(grid, device):
    """Recorder, decision and method on the same q, k, v."""
    search = TuneSearch(densities=tuple(DENSITIES), reach=3)
    recorder, qkv = search.recorder(), inputs(grid, device)
    for number in range(2):
        recorder.begin(number)
        memory = {}
        for step, each in enumerate(qkv):
            recorder(*each, call_at(grid, step, memory))
    found = {name.split(".")[1]: x for name, x in recorder.result().items()}
    losses = Losses.of(found["sums"], found["kept"])
    choice = allocate([(losses, torch.ones(STEPS, 1, HEADS))], 0.65)[0]
    assert choice.dense[0].all() and not choice.dense.all()
    tensors = {name: found[name] for name in ("step", "order")}
    tensors |= {"dense": choice.dense.byte(), "level": choice.level, "share": choice.share}
    outs, notes, _ = run(grid, qkv, tensors)
    density = sum(float(note.density) for note in notes) / STEPS
    assert density == pytest.approx(choice.density, abs=0.02)
    for step, (out, each) in enumerate(zip(outs, qkv, strict=True)):
        error = (out.double() - exact(*each)).square().sum((0, 2, 3)).cpu()
        whole = grid.tokens == grid.video and grid.video % BLOCK == 0
        predicted = choice.loss[step, 0]
        if whole:
            torch.testing.assert_close(error, predicted, rtol=1e-2, atol=1e-6)
        else:  # rows of text, and those at the ragged end, are not measured
            assert (error <= predicted * 1.6 + 1e-6).all() and (error >= predicted * 0.5).all()


def test_heaviest_keeps_a_block_a_row_and_all_that_is_not_video(device):
    grid = GRIDS[2]
    mass = torch.rand(2, HEADS, 6, 6, device=device)
    mass[..., 0] += 5
    for density in (0.0, 0.2, 0.6):
        keep = heaviest(mass, density, BLOCK, grid)
        assert keep[..., 5:].all() and keep[..., 5:, :].all()
        video = keep[..., :5, :5]
        assert bool(video.any(-1).all()) == (density > 0)
        assert int(video[0, 0].sum()) == round(density * 25)
        part = heaviest(mass[:, :, [1, 3]], density, BLOCK, grid)
        assert part.shape == (2, HEADS, 2, 6) and part[..., 5].all()


def test_padded_text_is_never_seen(device):
    grid = GRIDS[2]
    kv_len = torch.tensor([grid.tokens - 5, grid.tokens], dtype=torch.int32, device=device)
    qkv = inputs(grid, device)
    outs = run(grid, qkv, kv_len=kv_len)[0]
    for _, k, v in qkv:
        k[0, :, -5:], v[0, :, -5:] = 77.0, 99.0
    again = run(grid, qkv, kv_len=kv_len)[0]
    for one, other in zip(outs, again, strict=True):
        torch.testing.assert_close(one[0, :, :-5], other[0, :, :-5])


def test_a_skipped_dense_step_is_made_up_for_and_steps_are_matched(device):
    grid = GRIDS[0]
    qkv = inputs(grid, device)
    memory = {"calibration": calibration(grid)}
    note = Note()
    for step in (0, 1, 3):  # a cache skips step 2, where head 1 is dense
        note = Note()
        out = TunedAttention()(*qkv[step], call_at(grid, step, memory, note=note))
    assert note.searched
    expected = exact(*qkv[3])[:, 1].float()
    torch.testing.assert_close(out[:, 1], expected, atol=1e-5, rtol=1e-5)
    memory, searched = {"calibration": calibration(grid)}, []
    for step in range(8):  # twice the steps: no dense step comes twice
        note = Note()
        call = replace(call_at(grid, step, memory, note=note), steps=8)
        TunedAttention()(*qkv[step // 2], call)
        searched.append(note.searched)
    assert sum(searched) == 2


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("order", torch.zeros(1, 2, dtype=torch.int8), r"'order' must be \(1, 3\)"),
        ("order", torch.full((1, 3), 6, dtype=torch.int8), "'order' is out of range"),
        ("level", torch.full((4, 1, 3), 3, dtype=torch.int8), "'level' is out of range"),
        ("share", torch.full((4, 1, 3), 1.5), "'share' is out of range"),
        ("step", torch.tensor([0, 2, 1, 3]), "'step' does not rise"),
        ("dense", torch.zeros(4, 1, 3, dtype=torch.uint8), "first step is not dense"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(name, value, message, device):
    grid = GRIDS[0]
    with pytest.raises(ValueError, match=message):
        run(grid, inputs(grid, device)[:1], table(**{name: value}))


def test_its_file_says_when_to_refresh():
    with pytest.raises(ValueError, match="takes its dense steps from the file"):
        TunedAttention(refresh=4)
    assert NOTHING < 0
