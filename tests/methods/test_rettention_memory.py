"""What Re-ttention keeps between steps: how narrow, where, and how much it takes."""

import logging

import pytest
import torch

from tests.methods.test_rettention import EXACT, GRIDS, cached, call_at, each_ratio, inputs
from vdit_sparse import residual
from vdit_sparse.grid import Grid
from vdit_sparse.methods.rettention import RettentionAttention

# Largest error for residuals of magnitude m in a row: half a step of the format, and rounding.
STORED = {"bf16": 2.0**-8, "fp8": 2.0**-4, "int8": 1 / 254, "same": 0.0}


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("offload", [False, True])
def test_narrow_residuals_reconstruct_within_their_format(name, offload, device):
    grid = GRIDS[0]
    tensors = inputs(grid, device)
    fields = {**EXACT, "residual_dtype": name}
    method = RettentionAttention(**fields, offload=offload)
    with torch.inference_mode():
        memory, dense = cached(method, grid, tensors)
        exactly, _ = cached(RettentionAttention(**EXACT), grid, tensors)
        out = method(*tensors, call_at(grid, 1, memory))
    largest = exactly["residual"].values.abs().amax(-1, keepdim=True)
    assert ((out - dense).abs() <= STORED[name] * largest + 1e-5).all()
    assert name == "same" or not torch.equal(out, dense)
    values = memory["residual"].values
    assert values.dtype == (residual.DTYPES[name] or torch.float32)
    assert values.device.type == ("cpu" if offload else device.type)
    if offload:
        stays, _ = cached(RettentionAttention(**fields), grid, tensors)
        assert torch.equal(stays["residual"].load(device), memory["residual"].load(device))
        assert values.is_pinned() == (device.type == "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_inputs_give_sixteen_bit_outputs(dtype, device):
    tensors = inputs(GRIDS[0], device, dtype=dtype)
    method = RettentionAttention(**EXACT)
    memory, dense = cached(method, GRIDS[0], tensors)
    out = method(*tensors, call_at(GRIDS[0], 1, memory))
    assert out.dtype == dtype and out.shape == dense.shape
    torch.testing.assert_close(out, dense, atol=torch.finfo(dtype).eps, rtol=2.0**-7)


def test_store_keeps_zero_rows_and_wide_ranges(device):
    x = torch.randn(4, 5, 16, device=device) * torch.logspace(-30, 30, 4, device=device)[
        :, None, None
    ].clamp(1e-20, 1e20)
    x[0, 0] = 0
    for dtype, error in ((torch.int8, 1 / 254), (torch.float8_e4m3fn, 2.0**-4)):
        back = residual.store(x, dtype).load(device)
        assert (back[0, 0] == 0).all() and back.dtype == torch.float32
        assert ((back - x).abs() <= (error + 1e-5) * x.abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("name", STORED)
@each_ratio
def test_memory_is_what_a_run_takes(name, ratio, device):
    grid = GRIDS[0]
    method = RettentionAttention(
        dense_steps=0, dense_layers=1, last_dense_layers=1, residual_dtype=name, ratio=ratio
    )
    tensors = inputs(grid, device, batch=2, heads=3, dtype=torch.float16)
    taken = 0
    for layer in range(4):
        memory = {}
        method(*tensors, call_at(grid, 0, memory, layer=layer, layers=4))
        kept = [memory.get("rho"), *vars(memory["residual"]).values()] if memory else []
        taken += sum(x.nbytes for x in kept if x is not None)
    assert method.memory(grid, 3, 16, 4, branches=1, batch=2) == taken
    assert method.memory(grid, 3, 16, 4) == taken
    assert method.memory(grid, 3, 16, 2) == 0


def test_memory_of_the_sheet():
    method = RettentionAttention(ratio="off", dense_steps=15)
    # CogVideoX-2B: 2 x 17776 x 1920 x 2 bytes x 30 layers.
    assert method.memory(Grid(13, 30, 45, 226), 30, 64, 30) == 2 * 17776 * 1920 * 2 * 30
    with_rho = RettentionAttention().memory(Grid(21, 45, 80), 40, 128, 40, branches=1)
    assert with_rho == 75600 * 40 * 40 * (2 * 128 + 4)


def test_first_layer_of_a_branch_says_what_it_will_take(device, caplog):
    grid = GRIDS[0]
    method = RettentionAttention(**EXACT, dense_layers=1)
    with caplog.at_level(logging.INFO, logger="vdit_sparse"):
        for layer in range(3):
            memory = {}
            for step in (0, 5):
                call = call_at(grid, step, memory, layer=layer, layers=3)
                method(*inputs(grid, device), call)
    (record,) = caplog.records
    assert "Re-ttention keeps 0.00 GB for this guidance branch" in record.message


def test_too_little_memory_raises_before_any_is_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 10**9, 10**10))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 4 * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * 10**9)
    cuda = torch.device("cuda", 0)
    residual.announce(5 * 10**9, cuda, False)
    residual.announce(6 * 10**9, cuda, True)
    residual.announce(6 * 10**9, torch.device("cpu"), False)
    with pytest.raises(MemoryError, match=r"6\.00 GB.* 5\.00 GB free: use residual_dtype=\"int8\""):
        residual.announce(6 * 10**9, cuda, False)
