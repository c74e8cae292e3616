"""The Hopper kernel's own source on a multiprocessor of plain Python: its protocol and numbers.

`hopper_machine.py` says what it finds and what it does not.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.kernels import hopper_gluon
from tests.kernels.cases import Case, make
from tests.kernels.hopper_machine import Machine, attend_here
from tests.kernels.tolerance import assert_attention
from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.block_sparse.hopper import launch as launching
from vdit_sparse.kernels.block_sparse.hopper import self_check
from vdit_sparse.kernels.block_sparse.hopper.launch import launch, launch_skipping
from vdit_sparse.kernels.block_sparse.hopper.variants import FASTER, Variant, variant_for
from vdit_sparse.kernels.block_sparse.reference import forward as reference_forward
from vdit_sparse.kernels.triton_ops import INTERPRETED

pytestmark = pytest.mark.skipif(
    not INTERPRETED, reason="the launcher's Triton kernels have to run beside the machine, on a CPU"
)

CASES = {
    "ragged": Case(S=300, lists="batch", B=2),
    "more keys": Case(S=100, keys=257, layout="BSHD"),
    "key blocks of 64": Case(S=321, block=(128, 64), rows="empty"),
    "query blocks of 64": Case(S=321, block=(64, 128), rows="full"),
    "blocks of 64, D of 128": Case(S=193, block=64, D=128, rows="empty"),
    "all rows full": Case(S=257, rows="all"),
    "padded": Case(S=257, B=3, lists="batch", kv_len=(0, 77, 200)),
    "padded full rows": Case(S=257, B=2, rows="all", block=(128, 64), kv_len=(128, 250)),
    "masked slots": Case(S=257, valid=True, block=64),
    "masked and padded": Case(S=257, B=2, valid=True, kv_len=(100, 999)),
}
WIDE, THIN = Variant(2, 128, 2), Variant(1, 64, 3)
FORMS = {
    "two consumers": WIDE,
    "persistent": replace(WIDE, persistent=True),
    "ping-pong": replace(WIDE, pingpong=True),
    "persistent ping-pong": replace(WIDE, persistent=True, pingpong=True, stages=3),
    "landmark": replace(WIDE, landmark=True),
    "longest first": replace(WIDE, longest_first=True),
    "persistent, longest first": replace(WIDE, longest_first=True, persistent=True),
    "steps of 64": replace(WIDE, keys=64, stages=4),
    "one consumer": THIN,
    "one consumer, persistent": replace(THIN, persistent=True),
    "one stage": replace(THIN, keys=128, stages=1),
    "lone": replace(THIN, keys=128, stages=2, lone=True),
    "lone, persistent": replace(THIN, keys=128, stages=2, lone=True, persistent=True),
}
PERSISTENT = [name for name, form in FORMS.items() if form.persistent]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_float64(case, poisoned, monkeypatch):
    attend_here(monkeypatch)
    q, k, v, mask, kv_len = make(replace(case, dtype=torch.bfloat16), torch.device("cpu"))
    variant = variant_for(case.D, (mask.block_q, mask.block_k), "bf16", case.valid)
    result = launch(q, k, v, mask, case.D**-0.5, kv_len, "bf16", variant)
    assert_attention(result, q, k, v, mask, kv_len)


def uneven(block_q: int):
    """Lists of 0 to 7 blocks, the last of them ragged."""
    q, k, v = torch.randn(3, 1, 1, 870, 64, dtype=torch.bfloat16)
    rows = -(-870 // block_q)
    lengths = torch.randperm(rows) % 8
    keep = torch.rand(rows, 7).argsort(1) < lengths[:, None]
    return q, k, v, BlockMask.from_keep(keep, (block_q, 128))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_keeps_its_protocol(form, seed, poisoned, monkeypatch):
    attend_here(monkeypatch, seed, multiprocessors=1)
    q, k, v, mask = uneven(form.rows)
    result = launch(q, k, v, mask, 0.125, None, "bf16", form)
    assert_attention(result, q, k, v, mask)


@pytest.mark.parametrize("multiprocessors", [2, 3, 9])
@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("form", [FORMS[name] for name in PERSISTENT], ids=PERSISTENT)
def test_programs_share_the_tiles(form, seed, multiprocessors, poisoned, monkeypatch):
    """Seven tiles; with nine multiprocessors there are fewer tiles than programs."""
    attend_here(monkeypatch, seed, multiprocessors)
    q, k, v, mask = uneven(form.rows)
    result = launch(q, k, v, mask, 0.125, None, "bf16", form)
    assert_attention(result, q, k, v, mask)


def test_tiles_go_to_the_program_that_is_free(poisoned, monkeypatch):
    speeds = property(lambda self: 0.05 if self.place[0] == 0 else 1.0, lambda self, x: None)
    monkeypatch.setattr(Machine, "speed", speeds, raising=False)
    launcher = attend_here(monkeypatch, multiprocessors=2)
    case = Case(S=640, rows="all", dtype=torch.bfloat16)
    q, k, v, mask, _ = make(case, torch.device("cpu"))
    result = launch(q, k, v, mask, 0.125, None, "bf16", replace(WIDE, persistent=True))
    assert_attention(result, q, k, v, mask)
    slow, fast = (machine.outputs for machine in launcher.machines)
    # Each of ten tiles has two halves.
    assert slow + fast == 20 and fast >= 14


@pytest.mark.parametrize("pingpong", [False, True])
@pytest.mark.parametrize("multiprocessors", [1, 2])
@pytest.mark.parametrize("precision", ["bf16", "int8_bf16", "int8_fp8"])
@pytest.mark.parametrize(
    "name", ["padded", "padded full rows", "key blocks of 64", "masked and padded"]
)
def test_persistent_forms_take_any_lists(
    name, precision, multiprocessors, pingpong, poisoned, monkeypatch
):
    """Empty rows, ends of keys, masked slots."""
    attend_here(monkeypatch, 5, multiprocessors)
    case = replace(CASES[name], dtype=torch.bfloat16, D=128)
    q, k, v, mask, kv_len = make(case, torch.device("cpu"))
    form = variant_for(128, (mask.block_q, mask.block_k), precision, case.valid)
    form = replace(form, persistent=True, longest_first=True, pingpong=pingpong)
    scale = 128**-0.5
    out, lse = launch(q, k, v, mask, scale, kv_len, precision, form)
    if precision == "bf16":
        assert_attention((out, lse), q, k, v, mask, kv_len)
        return
    expected, expected_lse = reference_forward(q, k, v, mask, scale, kv_len, precision)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-4)
    difference = (out.float() - expected.float()).norm() / expected.float().norm()
    assert difference < {"int8_bf16": 5e-3, "int8_fp8": 3e-2}[precision]


@pytest.mark.parametrize("precision", ["int8_bf16", "int8_fp8"])
@pytest.mark.parametrize("name", ["padded", "blocks of 64, D of 128", "masked slots"])
@pytest.mark.parametrize("strength", [1, 30])
def test_8_bits_are_the_reference(strength, name, precision, monkeypatch):
    """Also where scores, and with them what takes off their offset, are large."""
    attend_here(monkeypatch)
    case = replace(CASES[name], dtype=torch.bfloat16)
    q, k, v, mask, kv_len = make(case, torch.device("cpu"))
    q, k = strength * q, strength * k
    q[0] = 0  # its blocks have the smallest scales that there are
    blocks, scale = (mask.block_q, mask.block_k), case.D**-0.5
    form = variant_for(case.D, blocks, precision, case.valid)
    out, lse = launch(q, k, v, mask, scale, kv_len, precision, form)
    expected, expected_lse = reference_forward(q, k, v, mask, scale, kv_len, precision)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-4)
    difference = (out.float() - expected.float()).norm() / expected.float().norm()
    assert difference < {"int8_bf16": 5e-3, "int8_fp8": 3e-2}[precision]


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("threshold", [1.0, 1e-30])
@pytest.mark.parametrize("name", ["blocks of 64, D of 128", "padded", "masked slots"])
def test_skipping(name, threshold, persistent, monkeypatch):
    attend_here(monkeypatch)
    case = replace(CASES[name], dtype=torch.bfloat16)
    q, k, v, mask, kv_len = make(case, torch.device("cpu"))
    k *= torch.linspace(0, 6, k.shape[2])[:, None]  # later keys weigh more
    form = variant_for(case.D, (mask.block_q, mask.block_k), "bf16", case.valid)
    form = replace(form, persistent=persistent, longest_first=persistent)
    out, lse, skipped = launch_skipping(q, k, v, mask, case.D**-0.5, kv_len, threshold, form)
    assert not (skipped & ~mask.keep()).any()
    assert skipped.any() == (threshold == 1.0) or name == "padded"
    if mask.block_q == 64:
        mask = BlockMask.from_keep(mask.keep() & ~skipped, 64, valid=mask.valid)
    if mask.block_q == 64 or not skipped.any():
        assert_attention((out, lse), q, k, v, mask, kv_len)


def broken(name: str, change):
    """A fault of the kernel, as a change to what the machine does."""

    def use(monkeypatch):
        monkeypatch.setattr(Machine, name, change(getattr(Machine, name)))

    return use


def without_numbers(store):
    return lambda self, x: None if self.dtype == torch.int32 else store(self, x)


FAULTS = {
    "no fence": broken("fence", lambda old: lambda self: None),
    "too few bytes": broken(
        "expect", lambda old: lambda self, bar, size: old(self, bar, size // 2)
    ),
    "no waiting": broken(
        "wait", lambda old: lambda self, bar, parity, pred=True: self.current.pause()
    ),
    "no wait for stores": broken("store_wait", lambda old: lambda self, pending: None),
    "no wait for products": broken(
        "product_wait", lambda old: lambda self, pending, wanted: old(self, 2, wanted)
    ),
    "stale counter": lambda monkeypatch: monkeypatch.setattr(
        launching, "tile_order", lambda *_: (None, torch.ones(1, dtype=torch.int32))
    ),
    "tile numbers are lost": lambda monkeypatch: monkeypatch.setattr(
        hopper_gluon.Buffer, "store", without_numbers(hopper_gluon.Buffer.store)
    ),
    "arrives twice": broken(
        "arrive", lambda old: lambda self, bar: (old(self, bar), old(self, bar))
    ),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_the_machine_finds_faults(fault, poisoned, monkeypatch):
    attend_here(monkeypatch, multiprocessors=1)
    fault(monkeypatch)
    q, k, v, mask = uneven(128)
    form = replace(WIDE, persistent=True)
    with pytest.raises((RuntimeError, AssertionError)):
        assert_attention(launch(q, k, v, mask, 0.125, None, "bf16", form), q, k, v, mask)


@pytest.mark.parametrize("valid", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("precision", "skipping"), [("bf16", False), ("int8_fp8", False), ("bf16", True)]
)
def test_its_self_check_passes(precision, skipping, padded, valid, monkeypatch):
    attend_here(monkeypatch)
    monkeypatch.setattr(self_check, "wait_for", lambda device: None)
    kind = (torch.device("cpu"), torch.bfloat16, 64, (64, 128), precision, valid)
    assert self_check._check.__wrapped__(*kind, padded, skipping) is None


def test_its_self_check_gives_a_program_several_tiles(monkeypatch):
    launcher = attend_here(monkeypatch, multiprocessors=4)
    monkeypatch.setattr(self_check, "wait_for", lambda device: None)
    kind = (torch.device("cpu"), torch.bfloat16, 64, (128, 128), "bf16", False)
    many = Variant(2, 128, 3, persistent=True, longest_first=True)
    monkeypatch.setitem(FASTER, kind[2:4] + kind[4:5], many)
    assert self_check._check.__wrapped__(*kind) is None
    assert len(launcher.machines) == 4
    assert sum(machine.outputs for machine in launcher.machines) == 2 * 12


def test_its_self_check_fails_where_it_is_wrong(monkeypatch):
    attend_here(monkeypatch)
    monkeypatch.setattr(self_check, "wait_for", lambda device: None)
    FAULTS["no waiting"](monkeypatch)
    reason = self_check._check.__wrapped__(
        torch.device("cpu"), torch.bfloat16, 64, (128, 128), "bf16", False
    )
    assert reason.startswith("its self-check failed")


def test_a_kernel_that_never_ends_is_not_waited_for(monkeypatch):
    event = SimpleNamespace(record=lambda stream: None, query=lambda: False)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(self_check, "SECONDS", 0.01)
    with pytest.raises(TimeoutError, match="did not end its self-check within 0 s and still holds"):
        self_check.wait_for(torch.device("cpu"))
