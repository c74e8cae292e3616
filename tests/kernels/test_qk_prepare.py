"""`qk_prepare`: both backends against float64 and against diffusers' own processors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers import transformer_hunyuan_video, transformer_wan

from tests.kernels.compile_kernels import ARCHITECTURES
from vdit_sparse.kernels.qk_prepare import (
    BACKENDS,
    merge_heads,
    prepare,
    prepare_hunyuan,
    prepare_wan,
    why_not,
)
from vdit_sparse.kernels.reorder import inverse, reorder

pytest_plugins = ["tests.kernels.bfloat16"]
pytestmark = pytest.mark.usefixtures("bfloat16")
EPS = 1e-6
TOKENS = ("wan", "hunyuan", "text", "merge", "norms")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def tables(tokens: int, D: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin `[tokens, D]`, each value twice."""
    angles = torch.rand(tokens, D // 2, device=device) * 40
    return tuple(f(angles).repeat_interleave(2, -1) for f in (torch.cos, torch.sin))


def expected(x, weight, rotary=None) -> torch.Tensor:
    """Norm and rotation in float64 without roundings between, `[B, S, H, D]`."""
    wide = x.double()
    over = (2, 3) if weight.numel() == x.shape[2] * x.shape[3] else (3,)
    wide = wide / (wide.square().mean(over, keepdim=True) + EPS).sqrt()
    wide = wide * weight.double().view(-1, x.shape[3])
    if rotary is None:
        return wide
    cos, sin = (table.double() for table in rotary)
    R = cos.shape[0]
    turned = torch.view_as_complex(wide[:, :R].unflatten(-1, (-1, 2)).contiguous())
    turned = turned * torch.complex(cos, sin)[None, :, None, ::2]
    return torch.cat([torch.view_as_real(turned).flatten(-2), wide[:, R:]], 1)


def unit(expected: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One unit in the last place of the larger number of each pair: a rotation moves the rounding
    of one into the other."""
    largest = expected.abs().unflatten(-1, (-1, 2)).amax(-1).repeat_interleave(2, -1)
    return torch.finfo(dtype).eps * largest + 1e-9


def assert_close(out, exact, dtype, units: float) -> None:
    assert out.dtype == dtype and out.shape == exact.shape and out.is_contiguous()
    off = (out.double() - exact.double()).abs() / unit(exact.double(), dtype)
    assert off.max() <= units, f"{off.max():.2f} units in the last place"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("across", [True, False], ids=["all heads", "each head"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("H, D", [(3, 16), (1, 6), (5, 64)])
def test_against_float64(H, D, dtype, across, backend, device):
    x = torch.randn(2, 5, H, D, device=device, dtype=dtype) * 3
    weight = torch.randn(H * D if across else D, device=device, dtype=dtype)
    rotary = tables(4, D, device)
    out = prepare(x, weight, rotary, eps=EPS, backend=backend)
    # Half a unit for each rounding, the first of which is turned: at most sqrt(2) / 2 of it.
    bound = 1.3 if dtype != torch.float32 else 16
    assert_close(out, expected(x, weight, rotary), dtype, bound)
    plain = prepare(x, weight, eps=EPS, backend=backend)
    assert_close(plain, expected(x, weight), dtype, 0.51 if dtype != torch.float32 else 8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_fused_projections(backend, device):
    fused = torch.randn(2, 5, 3, 3 * 8, device=device)
    weight, rotary = torch.rand(24, device=device), tables(5, 8, device)
    x = fused[:, :, 1].unflatten(2, (3, 8))
    out = prepare(x, weight, tuple(t[None, :, None] for t in rotary), eps=EPS, backend=backend)
    assert_close(out, expected(x, weight, rotary), torch.float32, 16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [None, 3], ids=["shared", "per head"])
@pytest.mark.parametrize("slots", [11, 20])
def test_rows_go_to_their_places(slots, heads, backend, device):
    x, text = torch.randn(2, 8, 3, 8, device=device), torch.randn(2, 3, 3, 8, device=device)
    weights = [torch.rand(8, device=device) for _ in range(2)]
    order = torch.stack([torch.randperm(slots, device=device) for _ in range(heads or 1)])
    order = torch.where(order < 11, order, -1)
    order = order if heads else order[0]
    call = {"eps": EPS, "tail": text, "tail_weight": weights[1], "backend": backend}
    rotary = tables(8, 8, device)
    rows = prepare(x, weights[0], rotary, **call)
    moved = prepare(x, weights[0], rotary, back=inverse(order, 11).int(), slots=slots, **call)
    assert torch.equal(moved.transpose(1, 2), reorder(rows.transpose(1, 2), order))
    back = inverse(order, 11)
    merged = merge_heads(moved.transpose(1, 2), back, backend=backend)
    assert merged.is_contiguous() and torch.equal(merged, rows.flatten(2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_places_outside_are_dropped(backend, device):
    x, weight = torch.randn(1, 4, 2, 8, device=device), torch.rand(8, device=device)
    back = torch.tensor([5, -1, 9, 0], device=device)
    out = prepare(x, weight, eps=EPS, back=back, slots=6, backend=backend)
    rows = prepare(x, weight, eps=EPS, backend=backend)
    assert torch.equal(out[:, [5, 0]], rows[:, [0, 3]]) and (out[:, 1:5] == 0).all()
    merged = merge_heads(out.transpose(1, 2), torch.tensor([5, -1], device=device), backend=backend)
    assert torch.equal(merged[:, 0], rows[:, 0].flatten(1)) and (merged[:, 1] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8], ids=str)
def test_heads_side_by_side(dtype, backend, device):
    x = torch.randint(-9, 9, (2, 3, 5, 7), device=device).to(dtype)
    for view in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        out = merge_heads(view, backend=backend)
        assert out.is_contiguous() and torch.equal(out, x.transpose(1, 2).flatten(2))


def caught(monkeypatch, module, processor, *call, **named):
    """Query and key that a stock processor hands to attention."""
    seen = []

    def catch(query, key, value, **_):
        seen.extend((query, key))
        return value

    monkeypatch.setattr(module, "dispatch_attention_fn", catch)
    with torch.no_grad():
        processor(*call, **named)
    return seen


def wan_rotary(device, D: int, grid: tuple[int, int, int]):
    rope = transformer_wan.WanRotaryPosEmbed(D, (1, 1, 1), 32).to(device)
    return rope(torch.empty(1, 1, *grid, device=device))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
def test_as_diffusers_wan(fused, dtype, backend, device, monkeypatch):
    H, D = 3, 48
    attn = transformer_wan.WanAttention(H * D, H, D, eps=EPS).to(device, dtype)
    torch.nn.init.normal_(attn.norm_q.weight)
    torch.nn.init.normal_(attn.norm_k.weight)
    if fused:
        attn.fuse_projections()
    rotary = wan_rotary(device, D, (2, 2, 2))
    hidden = torch.randn(2, 8, H * D, device=device, dtype=dtype)
    stock = caught(
        monkeypatch,
        transformer_wan,
        transformer_wan.WanAttnProcessor(),
        attn,
        hidden,
        rotary_emb=rotary,
    )
    with torch.no_grad():
        query, key, _ = transformer_wan._get_qkv_projections(attn, hidden, None)
        ours = prepare_wan(
            query, key, attn.norm_q.weight, attn.norm_k.weight, EPS, rotary,
            heads=H, backend=backend,
        )  # fmt: skip
    for out, theirs in zip(ours, stock, strict=True):
        assert_close(out, theirs, dtype, 1.01 if dtype != torch.float32 else 16)


def hunyuan_attention(H: int, D: int, two_streams: bool, device, dtype) -> Attention:
    added = {"added_kv_proj_dim": H * D, "context_pre_only": False} if two_streams else {}
    attn = Attention(
        query_dim=H * D, dim_head=D, heads=H, out_dim=H * D, bias=True, qk_norm="rms_norm",
        eps=EPS, pre_only=not two_streams, **added,
    ).to(device, dtype)  # fmt: skip
    for name, parameter in attn.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter)
    return attn


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("two_streams", [True, False], ids=["two streams", "single"])
def test_as_diffusers_hunyuan(two_streams, dtype, backend, device, monkeypatch):
    H, D, image, text = 2, 16, 8, 3
    attn = hunyuan_attention(H, D, two_streams, device, dtype)
    rope = transformer_hunyuan_video.HunyuanVideoRotaryPosEmbed(1, 1, [4, 6, 6])
    rotary = rope(torch.empty(1, 1, 2, 2, 2, device=device))
    hidden, encoder = (torch.randn(2, n, H * D, device=device, dtype=dtype) for n in (image, text))
    processor = transformer_hunyuan_video.HunyuanVideoAttnProcessor2_0()
    stock = caught(
        monkeypatch, transformer_hunyuan_video, processor, attn, hidden, encoder, None, rotary
    )
    weights = (attn.norm_q.weight, attn.norm_k.weight, EPS, rotary)
    with torch.no_grad():
        if two_streams:
            added = (attn.add_q_proj(encoder), attn.add_k_proj(encoder))
            of_text = {
                "text": added,
                "text_weights": (attn.norm_added_q.weight, attn.norm_added_k.weight),
            }
        else:
            hidden, of_text = torch.cat([hidden, encoder], 1), {}
        query, key = attn.to_q(hidden), attn.to_k(hidden)
        ours = prepare_hunyuan(query, key, *weights, heads=H, backend=backend, **of_text)
    for out, theirs in zip(ours, stock, strict=True):
        assert_close(out, theirs, dtype, 1.01 if dtype != torch.float32 else 16)


def test_one_operator_for_compilation(device):
    x, weight = torch.randn(1, 4, 2, 8, device=device), torch.rand(16, device=device)
    rotary, back = tables(4, 8, device), torch.tensor([3, 1, 0, 2], device=device)
    from vdit_sparse.kernels import qk_prepare

    operators = {
        qk_prepare._prepare: (x, weight, *rotary, None, None, back, EPS, True, 4, "reference"),
        qk_prepare._merge: (x.transpose(1, 2), back, "reference"),
    }
    for operator, call in operators.items():
        torch.library.opcheck(operator, call, test_utils=("test_schema", "test_faketensor"))


ROW = torch.zeros(1, 4, 2, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": ROW[0]}, ValueError, r"x must be \[B, S, H, D\].*\(4, 2, 8\)"),
        ({"x": ROW[..., :7]}, ValueError, "even D"),
        ({"x": ROW.to(torch.int32)}, TypeError, "fp16, bf16 or fp32, got torch.int32"),
        ({"weight": torch.zeros(4)}, ValueError, r"weight must be \[16\].*or \[8\].*\(4,\)"),
        ({"weight": torch.zeros(8).half()}, TypeError, "weight must be torch.float32 like x"),
        ({"rotary": (torch.zeros(5, 8),) * 2}, ValueError, r"cos must be \[R, 8\].*from 1 to 4"),
        ({"rotary": (torch.zeros(2, 4, 1, 8),) * 2}, ValueError, r"got \(2, 4, 8\)"),
        ({"rotary": (torch.zeros(4, 8).double(),) * 2}, TypeError, "cos must be fp32"),
        ({"tail": ROW}, ValueError, "belong together"),
        ({"tail": ROW[..., :4], "tail_weight": torch.zeros(4)}, ValueError, "must be like x"),
        ({"back": torch.arange(5)}, ValueError, r"each of the 4 tokens, got \(5,\)"),
        ({"slots": 8}, ValueError, "slots is the length of the order"),
        ({"x": ROW.clone().requires_grad_()}, RuntimeError, "no backward"),
        ({"backend": "cuda"}, ValueError, "'triton', 'reference'.*'cuda'"),
    ],
)
def test_wrong_calls_are_refused(change, error, message):
    call = {"x": ROW, "weight": torch.zeros(8), "eps": EPS} | change
    with pytest.raises(error, match=message):
        prepare(**call)
    with pytest.raises(ValueError, match="not empty"):
        merge_heads(ROW[0])


class OnGpu:
    """What `why_not` asks of a tensor."""

    def __init__(self, dtype, index=0):
        self.dtype, self.is_cuda = dtype, True
        self.device = torch.device("cuda", index)


def test_reasons_to_leave_it_to_diffusers():
    x, weight, table = OnGpu(torch.bfloat16), OnGpu(torch.bfloat16), OnGpu(torch.float32)
    assert why_not(x, weight, (table, table)) is None and why_not(x, weight, None) is None
    assert "no weight" in why_not(x, None, None)
    assert "no weight" in why_not(x, OnGpu(torch.float32), None)
    assert "on the device" in why_not(x, OnGpu(torch.bfloat16, 1), None)
    assert "torch.bfloat16, not fp32" in why_not(x, weight, (x, x))
    assert "needs a GPU" in why_not(torch.zeros(1), torch.zeros(1), None)


def test_one_graph_without_a_break(device):
    """As a processor calls it in a compiled block."""
    query, key = (torch.randn(1, 4, 16, device=device) for _ in range(2))
    weights, rotary = [torch.rand(16, device=device) for _ in range(2)], tables(4, 8, device)

    def block(query, key):
        reason = why_not(query, weights[0], rotary)
        query, key = prepare_wan(query, key, *weights, EPS, rotary, heads=2)
        return merge_heads(query.transpose(1, 2)), key * 2, reason

    with torch.no_grad():
        compiled = torch.compile(block, backend="eager", fullgraph=True)(query, key)
        plain = block(query, key)
    assert torch.equal(compiled[0], plain[0]) and torch.equal(compiled[1], plain[1])
    assert compiled[2] == plain[2]


def test_compiles_everywhere():
    script = str(Path(__file__).with_name("compile_qk_prepare.py"))
    root = Path(__file__).parents[2]
    command = ["env", "-u", "TRITON_INTERPRET", f"PYTHONPATH={root}", sys.executable, script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert {row["arch"] for row in rows} == set(ARCHITECTURES)
    for row in rows:
        assert row["spilled_bytes"] == 0 and row["wide"], row
        # Sums go through shared memory, in the kernels of one token numbers do not.
        assert row["shared"] <= (4096 if row["variant"] in TOKENS else 66 * 1024), row
