"""`block_sparse_attention`: which backend takes a call, and which calls are refused."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.kernels.cases import Case, make
from vdit_sparse.kernels.block_sparse import block_sparse_attention, choose_backend, explain
from vdit_sparse.kernels.block_sparse.tiles import architecture, nearest, tile_for


@pytest.mark.gpu
def test_the_default_on_a_gpu(device):
    from vdit_sparse.kernels.block_sparse.triton import choose_tile, why_pointers

    q, k, v, mask, _ = make(Case(S=512, D=128, layout="BSHD", dtype=torch.bfloat16), device)
    hopper = explain(q, k, v, mask)["hopper"]
    assert choose_backend(q, k, v, mask) == ("triton" if hopper else "hopper")
    if architecture(device) == "sm_90":
        assert why_pointers(q, k, v, mask) is None
        assert choose_tile(q, k, v, mask).descriptors
        odd = torch.empty(1, 2, 512, 132, dtype=q.dtype, device=device)[..., 1:129]
        assert "k is not aligned to 16 bytes" in why_pointers(q, odd, v, mask)


def test_gather_is_the_default_on_a_cpu():
    q, k, v, mask, _ = make(Case(S=128), torch.device("cpu"))
    assert choose_backend(q, k, v, mask) == "gather"
    assert explain(q, k, v, mask)["gather"] is None


def test_an_explicit_backend_runs_or_says_why_not(device):
    q, k, v, mask, _ = make(Case(S=128, D=320), device)
    with pytest.raises(ValueError, match="'triton' does not take this call: D is at most 256"):
        block_sparse_attention(q, k, v, mask, backend="triton")
    assert "D is at most 256" in explain(q, k, v, mask)["triton"]
    assert choose_backend(q, k, v, mask) == "gather"


def test_path_of_triton_says_why(device):
    from vdit_sparse.kernels.block_sparse.triton import why_pointers

    q, k, v, mask, _ = make(Case(S=128), torch.device("cpu"))
    assert "compute capability 9.0" in why_pointers(q, k, v, mask)


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_103", "sm_121", "gfx950", "cpu"])
@pytest.mark.parametrize("blocks", [(64, 64), (128, 128), (64, 128), (128, 64)])
def test_tiles_fit_their_blocks(arch, blocks):
    for width, itemsize, descriptors in ((16, 2, False), (128, 2, True), (256, 2, False)):
        tile = tile_for(arch, width, itemsize, blocks, descriptors)
        assert blocks[0] % tile.rows == 0 and blocks[1] % tile.keys == 0
        assert descriptors or not tile.descriptors
    assert nearest("sm_121") == "sm_120" and nearest("sm_86") == "sm_80"


def test_importing_needs_no_triton():
    code = (
        "import sys, vdit_sparse.kernels.block_sparse, vdit_sparse.kernels.block_sparse.tiles;"
        "sys.exit('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    assert done.returncode == 0


def _change(**changes):
    """A call that is wrong in one thing."""
    q, k, v, mask, _ = make(Case(D=32, B=2), torch.device("cpu"))
    call = {"q": q, "k": k, "v": v, "mask": mask}
    return call | {name: make_it(call) for name, make_it in changes.items()}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": lambda c: c["q"][0]}, ValueError, r"q must be \[B, H, S, D\]"),
        ({"v": lambda c: c["v"][:, :, :100]}, ValueError, r"v \[B, H, keys, D\].*\(2, 2, 100, 32"),
        ({"k": lambda c: c["k"][:, :, :0]}, ValueError, "not empty"),
        ({"q": lambda c: c["q"][:1]}, ValueError, "must agree in B, H and D"),
        ({"q": lambda c: c["q"].double()}, TypeError, "one dtype of fp16, bf16 and fp32"),
        ({"k": lambda c: c["k"].half()}, TypeError, "torch.float32, torch.float16, torch.float32"),
        ({"q": lambda c: c["q"].to("meta")}, ValueError, "share a device, got meta, cpu, cpu"),
        ({"q": lambda c: c["q"].mT.contiguous().mT}, ValueError, r"pass q.contiguous\(\)"),
        ({"q": lambda c: c["q"].requires_grad_()}, RuntimeError, "has no backward"),
        ({"kv_len": lambda c: torch.ones(2)}, ValueError, r"kv_len must be int32 \[2\], got"),
        (
            {"kv_len": lambda c: torch.ones(2, dtype=torch.int32, device="meta")},
            ValueError,
            "kv_len must be on cpu",
        ),
        ({"q": lambda c: c["q"][:, :, :100]}, ValueError, r"2 x 2 blocks.*100 queries.*1 x 2"),
        (
            {"mask": lambda c: replace(c["mask"], idx=c["mask"].idx.expand(3, -1, -1, -1),
                                       cnt=c["mask"].cnt.expand(3, -1, -1))},
            ValueError,
            r"1 or 2 batch rows and 1 or 2 heads like q, got \(3, 2\)",
        ),
        ({"mask": lambda c: c["mask"].to("meta")}, ValueError, "mask must be on cpu like q"),
        ({"precision": lambda c: "fp4"}, ValueError, r"'int8_bf16', 'int8_fp8'\), got 'fp4'"),
        ({"backend": lambda c: "cutlass"}, ValueError, "'reference'.*got 'cutlass'"),
        ({"scale": lambda c: -1.0}, ValueError, "scale must be a positive number, got -1.0"),
    ],
)  # fmt: skip
def test_wrong_calls_are_refused(changes, error, message):
    call = _change(**changes)
    with pytest.raises(error, match=message):
        block_sparse_attention(
            call.pop("q"), call.pop("k"), call.pop("v"), call.pop("mask"), **call
        )


def test_gradients_are_fine_when_nobody_records_them():
    call = _change()
    with torch.no_grad():
        out, _ = block_sparse_attention(
            call["q"].requires_grad_(), call["k"], call["v"], call["mask"]
        )
    assert not out.requires_grad
