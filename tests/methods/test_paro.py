"""PAROAttention: what it does with a calibration, and which ones it refuses."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vdit_sparse.calibration import Calibration, load, save
from vdit_sparse.call import Call, Origin
from vdit_sparse.grid import Grid
from vdit_sparse.methods.paro import PAROAttention, pack, unpack
from vdit_sparse.orders import AXES, axis_order

GRID, LAYERS, STEPS, HEADS, BLOCK = Grid(5, 7, 9, 17), 2, 8, 6, 64
BLOCKS = -(-GRID.tokens // BLOCK)
ORDERS = torch.stack([torch.arange(6), torch.zeros(6)]).to(torch.int8)
BINS = torch.tensor([0, 0, 1, 1, 2, 2, 2, -1], dtype=torch.int16)


def tensors(grid=GRID, share=0.4):
    blocks = -(-grid.tokens // BLOCK)
    keep = torch.rand(3, LAYERS, HEADS, blocks, blocks) < share
    return {
        "transformer.order": ORDERS.clone(),
        "transformer.bin": BINS.clone(),
        "transformer.keep": pack(keep),
    }


def write(path, found, grid=GRID, method="PAROAttention", block=BLOCK):
    about = {"layers": LAYERS, "steps": STEPS, "prompts": ("a cat",), "seeds": (0,), "versions": {}}
    origin, fields = Origin(config="abc"), {"block": block}
    path = path / "paro.safetensors"
    made = Calibration(
        path=str(path),
        method=method,
        fields=fields,
        origin=origin,
        grid=grid,
        tensors=found,
        **about,
    )
    save(made)
    return str(path)


def call_at(step=0, layer=0, grid=GRID, memory=None, **changed):
    origin = Origin(config="abc", expert=changed.pop("expert", "transformer"))
    memory = {} if memory is None else memory
    return Call(grid, layer, LAYERS, step, changed.pop("steps", STEPS), memory, origin)


def inputs(device, grid=GRID, heads=HEADS):
    return torch.randn(3, 2, heads, grid.tokens, 16, device=device)


@pytest.mark.parametrize("blocks", [1, 2, 3, 8, 13])
def test_bits_are_numpys_and_come_back(blocks, device):
    keep = torch.rand(2, 3, blocks, blocks, device=device) < 0.5
    bits = pack(keep)
    expected = np.packbits(keep.cpu().numpy().reshape(2, 3, -1), axis=-1)
    assert np.array_equal(bits.cpu().numpy(), expected)
    assert torch.equal(unpack(bits, blocks), keep)


def test_heads_in_all_orders_with_full_masks_equal_dense(tmp_path, device):
    method = PAROAttention(calibration=write(tmp_path, tensors(share=2)))
    q, k, v = inputs(device)
    call = call_at()
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double()).float()
    torch.testing.assert_close(method(q, k, v, call), expected, atol=1e-5, rtol=1e-5)
    assert float(call.note.density) == 1


def test_output_is_attention_over_the_kept_tiles_of_each_heads_order(tmp_path, device):
    found = tensors()
    method = PAROAttention(calibration=write(tmp_path, found))
    q, k, v = inputs(device)
    keep = unpack(found["transformer.keep"], BLOCKS)[1, 0]
    edge = GRID.video // BLOCK
    keep[:, edge:], keep[:, :, edge:] = True, True
    keep |= torch.diag_embed(~keep.any(-1))
    rows = keep.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
    seen = torch.zeros(HEADS, GRID.tokens, GRID.tokens, dtype=torch.bool)
    for head, axes in enumerate(AXES):
        order = axis_order(GRID, axes, torch.device("cpu"))
        seen[head][order[:, None], order] = rows[head, : GRID.tokens, : GRID.tokens]
    exact = [x.double() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*exact, attn_mask=seen.to(device)).float()
    call = call_at(step=2)
    torch.testing.assert_close(method(q, k, v, call), expected, atol=1e-5, rtol=1e-5)
    assert float(call.note.density) == pytest.approx(float(keep.float().mean()))


@pytest.mark.parametrize(
    "grid", [GRID, Grid(1, 9, 13), Grid(2, 8, 8), Grid(3, 8, 8, 70), Grid(1, 2, 3, 5)], ids=str
)
def test_text_and_the_end_of_the_video_are_kept_and_no_row_is_empty(grid, tmp_path, device):
    method = PAROAttention(calibration=write(tmp_path, tensors(grid, share=0), grid))
    q, k, _ = inputs(device, grid)
    plan = method.plan(q, k, call_at(grid=grid))
    keep, edge = plan.mask.keep(), grid.video // BLOCK
    assert keep[:, :, edge:].all()
    assert keep[..., edge:].all()
    assert keep.any(-1).all()
    # The file keeps nothing: each row has its own block, and what is always kept.
    assert keep[0, 0, :edge, :edge].sum() == (edge if edge == keep.shape[-1] else 0)
    for order in plan.order:
        assert torch.equal(order.sort().values.cpu(), torch.arange(grid.tokens))
        assert torch.equal(order[grid.video :].cpu(), torch.arange(grid.video, grid.tokens))


@pytest.mark.parametrize("searched", [0, 17, 90])
@pytest.mark.parametrize("text", [0, 5, 17, 70])
def test_text_may_have_another_length_than_in_the_search(text, searched, tmp_path, device):
    grid, files = Grid(5, 7, 9, text), Grid(5, 7, 9, searched)
    found, edge = tensors(files), grid.video // BLOCK
    method = PAROAttention(calibration=write(tmp_path, found, files))
    q, k, v = inputs(device, grid)
    kept = method.plan(q, k, call_at(grid=grid)).mask.keep()[0].cpu()
    filed = unpack(found["transformer.keep"], -(-files.tokens // BLOCK))[0, 0, :, :edge, :edge]
    assert torch.equal(kept[:, :edge, :edge], filed)
    assert kept.shape[-1] == -(-grid.tokens // BLOCK) > edge
    assert kept[:, edge:].all() and kept[..., edge:].all()
    assert method(q, k, v, call_at(grid=grid)).isfinite().all()


def test_branches_with_text_of_different_lengths_share_no_plan(tmp_path, device):
    method = PAROAttention(calibration=write(tmp_path, tensors()))
    plans = []
    for text in (17, 90, 17):
        grid = Grid(5, 7, 9, text)
        plans.append(method.plan(*inputs(device, grid)[:2], call_at(grid=grid)))
    assert plans[0] is plans[2]
    assert [plan.order.shape[-1] for plan in plans[:2]] == [332, 405]


def test_raster_layers_are_not_reordered(tmp_path, device):
    method = PAROAttention(calibration=write(tmp_path, tensors()))
    q, k, _ = inputs(device)
    assert method.plan(q, k, call_at(layer=1)).order is None
    assert method.plan(q, k, call_at(layer=0)).order.shape == (HEADS, GRID.tokens)


def test_a_plan_is_built_once_a_bin_and_shared_by_the_branches(tmp_path, device):
    method = PAROAttention(calibration=write(tmp_path, tensors()))
    q, k, _ = inputs(device)
    with torch.inference_mode():
        mine, other = {}, {}
        plans = [method.current_plan(q, k, call_at(step, memory=mine)) for step in range(STEPS)]
        twin = method.current_plan(q, k, call_at(7, memory=other))
    # Step 7 was not searched; the nearest one that was is in bin 2.
    same = [plans.index(plan) for plan in plans]
    assert same == [0, 0, 2, 2, 4, 4, 4, 4]
    assert twin is plans[-1]
    assert not twin.mask.idx.is_inference()
    fresh = method.plan(q, k, call_at(0, layer=1))
    assert fresh is not plans[0]


def test_steps_are_matched_by_their_share_of_the_run(tmp_path, device):
    method = PAROAttention(calibration=write(tmp_path, tensors()))
    q, k, _ = inputs(device)
    searched = {number: method.plan(q, k, call_at(number * 2)) for number in range(3)}
    with pytest.warns(UserWarning, match="number of steps of the file 8, of this run 3"):
        bins = [method.plan(q, k, call_at(step, steps=3)) for step in range(3)]
    assert bins == [searched[0], searched[2], searched[2]]


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("order", torch.zeros(2, 5, dtype=torch.int8), r"'order' must be torch.int8 \(2, 6\)"),
        ("order", torch.zeros(2, 6, dtype=torch.int64), r"got torch.int64 \(2, 6\)"),
        ("order", torch.full((2, 6), 6, dtype=torch.int8), "integers from 0 to 5, got 6 to 6"),
        ("order", torch.full((2, 6), -1, dtype=torch.int8), "integers from 0 to 5, got -1 to -1"),
        ("bin", torch.zeros(7, dtype=torch.int16), r"'bin' must be integers \(8,\) for 6 heads"),
        ("bin", torch.full((8,), 3, dtype=torch.int16), "integers from -1 to 2, got 3 to 3"),
        ("bin", torch.full((8,), -1, dtype=torch.int16), "integers from -1 to 2, got -1 to -1"),
        ("bin", torch.zeros(8), "'bin' must hold integers"),
        ("keep", torch.zeros(3, 2, 6, 4, dtype=torch.uint8), "'keep' must be torch.uint8"),
        ("keep", torch.zeros(0, 2, 6, 5, dtype=torch.uint8), "'keep' must be torch.uint8"),
    ],
)
def test_tensors_of_other_shapes_raise(name, value, message, tmp_path, device):
    path = write(tmp_path, {**tensors(), f"transformer.{name}": value})
    q, k, _ = inputs(device)
    with pytest.raises(ValueError, match=message):
        PAROAttention(calibration=path).plan(q, k, call_at())


def test_files_for_something_else_raise(tmp_path, device):
    path = write(tmp_path, tensors())
    q, k, v = inputs(device)
    with pytest.raises(ValueError, match="PAROAttention needs a calibration for this model"):
        PAROAttention()(q, k, v, call_at())
    with pytest.raises(ValueError, match=r"was searched with block=64, but .* has block=128"):
        PAROAttention(calibration=path, block=128)(q, k, v, call_at())
    with pytest.raises(ValueError, match="has no 'order' of 'transformer_2', only of transformer"):
        PAROAttention(calibration=path)(q, k, v, call_at(expert="transformer_2"))
    other = Grid(5, 9, 7, 17)
    with pytest.raises(ValueError, match="was made for something else: grid"):
        PAROAttention(calibration=path)(q, k, v, call_at(grid=other))
    with pytest.raises(ValueError, match="for 3 heads"):
        PAROAttention(calibration=path)(*inputs(device, heads=3), call_at())


def test_a_file_of_another_method_raises(tmp_path, device):
    path = write(tmp_path, tensors(), method="SparseVDiTAttention")
    with pytest.raises(ValueError, match="method of the file SparseVDiTAttention"):
        PAROAttention(calibration=path)(*inputs(device), call_at())


def test_what_is_saved_is_what_is_loaded(tmp_path):
    found = tensors()
    loaded = load(write(tmp_path, found))
    assert loaded.tensors.keys() == found.keys()
    for name, x in found.items():
        assert torch.equal(loaded.tensors[name], x)
