"""The look at the first sparse call of each layer."""

from dataclasses import dataclass, replace

import pytest
import torch

from tests.tiny_models import WAN_CALL, tiny_wan
from vdit_sparse import RadialAttention, RettentionAttention, SparseAttention, apply, summary
from vdit_sparse.call import Call, Note
from vdit_sparse.grid import Grid
from vdit_sparse.pipelines.spot_check import AttentionWarning, SpotCheck, exact_rows

GRID = Grid(2, 4, 8, 16)
ALL_BLOCKS = RadialAttention(block=64, decay=1e9, decimate=False)


@dataclass(frozen=True, kw_only=True)
class Broken(SparseAttention):
    """Adds a number to what exact attention gives."""

    add: float = 0.0

    def plan(self, q, k, call):
        raise NotImplementedError

    def attend(self, q, k, v, call):
        call.note.density = 0.25
        return torch.nn.functional.scaled_dot_product_attention(q, k, v) + self.add


def inputs(device):
    seeded = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, GRID.tokens, 16, generator=seeded).to(device) for _ in range(3)]


def call_of(**changes):
    return replace(Call(GRID, 1, 2, 0, 4, {}), **changes)


def test_exact_rows_are_attention_in_fp64_without_the_padding(device):
    q, k, v = inputs(device)
    kv_len = torch.tensor([80, 67], dtype=torch.int32, device=device)
    rows = torch.tensor([0, 5, 63], device=device)
    got = exact_rows(q, k, v, rows, kv_len)
    for row, end in enumerate((80, 67)):
        qkv = (q[row, :, rows].double(), k[row, :, :end].double(), v[row, :, :end].double())
        expected = torch.nn.functional.scaled_dot_product_attention(*qkv)
        torch.testing.assert_close(got[row].double(), expected, atol=1e-4, rtol=0)


def test_a_good_layer_is_looked_at_once_a_run(device):
    qkv = inputs(device)
    out = torch.nn.functional.scaled_dot_product_attention(*qkv)
    check = SpotCheck(strict=True)
    assert check.look("blocks.1", tuple(qkv), out, call_of(), ALL_BLOCKS) < 5e-3
    assert check.look("blocks.1", tuple(qkv), out + 100, call_of(), ALL_BLOCKS) is None
    check.forget()
    with pytest.raises(RuntimeError, match=r"of blocks\.1 has a relative error of \d+"):
        check.look("blocks.1", tuple(qkv), out + 100, call_of(), ALL_BLOCKS)


@pytest.mark.parametrize(
    ("spoil", "method", "note", "words"),
    [
        ("k", ALL_BLOCKS, Note(), "its k is not finite already"),
        ("out", ALL_BLOCKS, Note(), "kernel overflows"),
        ("", replace(ALL_BLOCKS, precision="int8_fp8"), Note(), "8-bit precision 'int8_fp8'"),
        ("", ALL_BLOCKS, Note(0.1, calibration="a.safetensors"), r"a\.safetensors may not fit"),
        ("", ALL_BLOCKS, Note(torch.tensor(0.25)), "keeps 25% of the blocks"),
    ],
)
def test_the_warning_names_the_likely_cause(spoil, method, note, words, device):
    qkv = dict(zip("qkv", inputs(device), strict=True))
    out = torch.nn.functional.scaled_dot_product_attention(*qkv.values()) + 10
    if spoil:
        {**qkv, "out": out}[spoil].fill_(torch.nan)
    with pytest.warns(AttentionWarning, match=words):
        SpotCheck().look("blocks.0", tuple(qkv.values()), out, call_of(note=note), method)


def test_searches_and_cache_steps_are_passed_over():
    pipe = tiny_wan()
    apply(pipe, RettentionAttention(block=64, dense_steps=0, refresh=2, density=0.3), check=True)
    pipe(**WAN_CALL)
    looked = [entry.step for entry in summary(pipe).entries if entry.error is not None]
    assert looked == [1, 1]


def test_a_run_reports_its_largest_error_and_why_calls_ran_dense():
    pipe = tiny_wan()
    apply(pipe, replace(ALL_BLOCKS, dense_steps=1, dense_layers=1), strict=True)
    pipe(**WAN_CALL)
    done = summary(pipe)
    assert done.error < 1e-4
    assert [entry.error is not None for entry in done.entries if not entry.dense].count(True) == 1
    assert done.dense_calls == {"dense_steps": 4, "dense_layers": 4}
    assert "4 of 12 calls dense by dense_steps" in str(done) and "looked at 0.000" in str(done)


def test_a_broken_layer_warns_or_raises_and_says_nothing_without_check(recwarn):
    pipe = tiny_wan()
    apply(pipe, Broken(add=5.0))
    pipe(**WAN_CALL)
    assert not [w for w in recwarn if w.category is AttentionWarning]
    assert summary(pipe).error is None
    apply(pipe, Broken(add=5.0), check=True)
    with pytest.warns(AttentionWarning, match=r"of blocks\.0\.attn1 .*raise its density"):
        pipe(**WAN_CALL)
    apply(pipe, Broken(add=torch.nan), strict=True)
    with pytest.raises(RuntimeError, match=r"of blocks\.0\.attn1 .*kernel overflows"):
        pipe(**WAN_CALL)
