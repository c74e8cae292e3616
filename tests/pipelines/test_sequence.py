"""Video first and back, and what stands in the padding."""

from dataclasses import replace

import pytest
import torch

from tests.methods.cases import call_at, ready
from vdit_sparse.grid import Grid
from vdit_sparse.methods import METHODS
from vdit_sparse.pipelines.sequence import VideoFirst

GRID = Grid(4, 8, 16, 21)
KV_LEN = (GRID.tokens, GRID.video + 4)


@pytest.mark.parametrize("lead", [0, 2, 3])
def test_moves_video_first_and_real_text_before_padding(lead, device):
    grid = Grid(1, 2, 2, 3)
    text, video = torch.tensor([10.0, 11.0, 12.0]), torch.arange(4.0)
    x = torch.cat([text[:lead], video, text[lead:]]).expand(2, -1)[..., None, None].to(device)
    real = torch.tensor([[True, True, True], [False, True, False]], device=device)
    sequence = VideoFirst(grid, lead, real)
    moved = sequence.move(x)[..., 0, 0]
    assert moved.tolist() == [[0, 1, 2, 3, 10, 11, 12], [0, 1, 2, 3, 11, 0, 0]]
    assert sequence.kv_len.tolist() == [7, 5]
    back = sequence.back(x := torch.arange(7.0, device=device).expand(2, -1)[..., None, None])
    assert torch.equal(VideoFirst(grid, lead).move(back)[0], x[0])
    assert VideoFirst(grid, lead).move(back)[1, :, 0, 0].tolist() == [0, 1, 2, 3, 5, 4, 6]


def test_text_that_is_last_and_whole_is_not_copied():
    x = torch.randn(1, 7, 1, 1)
    assert VideoFirst(Grid(1, 2, 2, 3)).move(x) is x
    assert VideoFirst(Grid(1, 2, 2, 3)).kv_len is None


def inputs(device):
    seeded = torch.Generator().manual_seed(3)
    return [torch.randn(2, 2, GRID.tokens, 16, generator=seeded).to(device) for _ in range(3)]


def outputs(name, qkv, kv_len, **fields):
    """Both steps of a run: the second reads what the first left in the memory."""
    method, call = ready(name, refresh=2, **fields), replace(call_at(name, GRID), kv_len=kv_len)
    return [method(*qkv, replace(call, step=step)) for step in range(2)]


@pytest.mark.parametrize("fill", [1e4, torch.inf, torch.nan])
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        *((name, {}) for name in METHODS),
        ("rettention", {"mask": "token"}),
        ("adaspa", {"dense_search": True}),
    ],
)
def test_what_stands_in_the_padding_does_not_matter(name, fields, fill, device):
    qkv = inputs(device)
    kv_len = torch.tensor(KV_LEN, dtype=torch.int32, device=device)
    clean = outputs(name, qkv, kv_len, **fields)
    for x in qkv:
        x[1, :, KV_LEN[1] :] = fill
    for out, expected in zip(outputs(name, qkv, kv_len, **fields), clean, strict=True):
        for row, end in enumerate(KV_LEN):
            assert torch.equal(out[row, :, :end], expected[row, :, :end])


@pytest.mark.parametrize("name", METHODS)
def test_padded_keys_are_masked_and_not_attended(name, device):
    qkv = inputs(device)
    kv_len = torch.tensor(KV_LEN, dtype=torch.int32, device=device)
    padded = outputs(name, qkv, kv_len)
    longer = outputs(name, qkv, None)
    for out, other in zip(padded, longer, strict=True):
        torch.testing.assert_close(out[0], other[0], atol=2e-5, rtol=0)
        assert (out[1] - other[1])[:, : KV_LEN[1]].abs().max() > 1e-3


def test_a_dense_call_masks_the_padding_too(device):
    q, k, v = inputs(device)
    kv_len = torch.tensor(KV_LEN, dtype=torch.int32, device=device)
    out = outputs("radial", (q, k, v), kv_len, dense_layers=2)[0]
    alone = (x[1:, :, : KV_LEN[1]].double() for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*alone)
    # Dense fp32 attention may multiply in tf32 on a GPU.
    atol = 1e-5 if device.type == "cpu" else 5e-3
    torch.testing.assert_close(out[1:, :, : KV_LEN[1]].double(), expected, atol=atol, rtol=0)
