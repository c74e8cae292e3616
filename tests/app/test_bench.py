"""`vdit-sparse bench`: small models and shapes, on the machine that there is."""

import csv
import re

import pytest
import torch

from vdit_sparse.app.bench_model import Row, _judged
from vdit_sparse.kernels.bench import __main__ as bench_main
from vdit_sparse.kernels.bench import prepare as bench_prepare
from vdit_sparse.kernels.bench.kernels import KERNELS, listed
from vdit_sparse.kernels.bench.measure import Masked, checked, verify_rows
from vdit_sparse.kernels.bench.problem import PATTERNS, SHAPES, Problem, Shape
from vdit_sparse.kernels.block_mask import BlockMask
from vdit_sparse.kernels.block_sparse.reference import forward as reference
from vdit_sparse.methods import METHODS
from vdit_sparse.pipelines.checkpoints import Checkpoint
from vdit_sparse.pipelines.random_model import SIZES, random_inputs, random_transformer

WAN = {"num_attention_heads": 2, "attention_head_dim": 64, "ffn_dim": 64, "freq_dim": 32}
HUNYUAN = {"num_attention_heads": 2, "attention_head_dim": 24, "rope_axes_dim": (4, 10, 10)}
TINY = {
    "tiny": Checkpoint(
        transformer="WanTransformer3DModel",
        config={**WAN, "text_dim": 16},
        layers=2,
        heads=2,
        head_dim=64,
        text=8,
    ),
    "tiny-joint": Checkpoint(
        transformer="HunyuanVideoTransformer3DModel",
        config={**HUNYUAN, "text_embed_dim": 16},
        layers=3,
        heads=2,
        head_dim=24,
        text=8,
        joint=True,
    ),
}
VIDEO = ("--size", "128x128", "--frames", "17", "--block", "64", "--density", "0.4")


@pytest.fixture(autouse=True)
def tiny_sizes(monkeypatch):
    for name, size in TINY.items():
        monkeypatch.setitem(SIZES, name, size)
    monkeypatch.setitem(SHAPES, "tiny", Shape(2, 64, 5, 8, 12, text=20))


def test_sizes_are_the_published_ones():
    tokens = {
        ("wan2.1-14b", 720, 1280, 81): 75_600,
        ("wan2.1-1.3b", 480, 832, 81): 32_760,
        ("hunyuanvideo", 720, 1280, 129): 119_056,
    }
    for (name, *video), expected in tokens.items():
        assert SIZES[name].grid(*video).tokens == expected
    assert [SIZES[name].heads for name in ("wan2.1-14b", "wan2.1-1.3b", "hunyuanvideo")] == [
        40,
        12,
        24,
    ]


@pytest.mark.parametrize("name", TINY)
def test_random_models_have_the_dtypes_of_loaded_ones(name, device):
    model = random_transformer(TINY[name], 2, device, torch.bfloat16)
    kept = set(model._keep_in_fp32_modules or ())
    for each, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.device.type == device.type
        expected = torch.float32 if kept & set(each.split(".")) else torch.bfloat16
        assert tensor.dtype == expected, each
    inputs = random_inputs(TINY[name], (64, 64, 5), device, torch.bfloat16)
    with torch.no_grad():
        out = model(**inputs, timestep=torch.tensor([7], device=device), return_dict=False)[0]
    assert out.shape == inputs["hidden_states"].shape and out.isfinite().all()


def test_model_with_every_method(cli, tmp_path):
    file = tmp_path / "rows.csv"
    command = ("bench", "model", "--model", "tiny", *VIDEO, "--device", "cpu", "--no-compile")
    done = cli(*command, "--rounds", 1, "--csv", file)
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader(file.open()))
    assert [row["name"] for row in rows] == [
        "dense native, eager",
        "sdpa, by arithmetic",
        *(f"{name} bf16" for name in METHODS),
    ]
    assert not any(row["error"] for row in rows)
    dense, alone = rows[:2]
    for row in rows:
        assert row["model"] == "tiny" and row["tokens"] == "320" and row["commit"]
        assert float(row["attention"]) > 0 and float(row["ms"]) > 0
        assert float(row["speedup"]) == pytest.approx(float(dense["ms"]) / float(row["ms"]))
        assert row["name"] in done.output
    rest = float(dense["ms"]) - float(dense["attention"])
    assert float(alone["ms"]) == pytest.approx(rest + float(alone["attention"]))
    assert float(rows[4]["density"]) == pytest.approx(0.4)
    cli(*command, "--rounds", 1, "--method", "radial", "--csv", file)
    assert len(list(csv.DictReader(file.open()))) == len(rows) + 3


def test_model_with_text_in_its_sequence(cli):
    command = ("bench", "model", "--model", "tiny-joint", *VIDEO, "--device", "cpu")
    done = cli(*command, "--no-compile", "--rounds", 1, "--method", "adaspa")
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.output.splitlines() if line.startswith("adaspa bf16 ")]
    assert 0 < float(line.split()[-4]) < 1, line


def test_what_does_not_run_says_why(cli):
    command = ("bench", "model", "--model", "tiny", *VIDEO, "--device", "cpu", "--no-compile")
    words = ("--precision", "int8_fp8", "--method", "radial", "--rounds", 1)
    done = cli(*command, *words, "--dense", "native", "--dense", "flash")
    assert done.exit_code == 0, done.output
    assert "dense flash, eager: " in done.output
    assert "radial int8_fp8: " in done.output


def test_bound_is_amdahls():
    best, sparse = Row("dense", 100.0, dense=True, attention=60.0), Row("x", 50.0, density=0.25)
    judged = _judged(sparse, best)
    assert judged.bound == pytest.approx(100 / (40 + 15)) and judged.speedup == 2
    assert _judged(Row("x", error="why"), best).bound is None


def small_problem(device, tokens=500, block=64) -> Problem:
    return Problem(3, tokens, 64, block, torch.float32, device)


def test_shapes_are_the_published_ones():
    tokens = {name: shape.tokens for name, shape in SHAPES.items() if name != "tiny"}
    assert tokens == {
        "wan-480p": 32_760,
        "wan-720p": 75_600,
        "hunyuan-720p": 119_056,
        "cogvideox1.5": 45_106,
        "flux-1024": 4_608,
        "flux-4096": 66_048,
    }


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_have_the_density_that_was_asked_for(pattern, device):
    mask = small_problem(device, 64 * 64).mask(pattern, 0.25)
    assert mask.density() == pytest.approx(0.25, abs=0.02)
    assert (mask.cnt >= 1).all()
    spread = int(mask.cnt.max()) / int(mask.cnt.min())
    assert (spread > 6) == (pattern == "ragged")


@pytest.mark.parametrize("valid", [False, True], ids=["whole blocks", "padded blocks"])
def test_sampled_rows_tell_right_from_wrong(valid, device):
    problem = small_problem(device)
    tensors, mask = problem.tensors(), problem.mask("random", 0.4)
    real = torch.full((mask.nk,), 50, dtype=torch.int32, device=device) if valid else None
    mask = BlockMask(mask.idx, mask.cnt, mask.nk, 64, 64, real)
    out, _ = reference(*tensors, mask, 64**-0.5)
    assert verify_rows(out, tensors, mask) < 1e-5
    with pytest.raises(RuntimeError, match="wrong by .*not timed"):
        verify_rows(out * 1.001, tensors, mask)
    with pytest.raises(RuntimeError, match="relative error 1.00e-01"):
        verify_rows(out * 1.1, tensors, mask, 0.01)
    assert verify_rows(out * 1.001, tensors, mask, 0.01) > 0
    dense = torch.nn.functional.scaled_dot_product_attention(*tensors)
    assert verify_rows(dense, tensors, None) < 1e-5
    with pytest.raises(RuntimeError):
        verify_rows(dense, tensors, mask)


def test_lists_for_other_packages_name_every_kept_block(device):
    mask = small_problem(device).mask("ragged", 0.4)
    cnt = mask.cnt.clone()
    cnt[:, 0, 0] = mask.nk  # all blocks, which `idx` does not list
    mask = BlockMask(mask.idx, cnt, mask.nk, 64, 64)
    counts, columns = listed(mask, 3)
    again = BlockMask(columns, counts, mask.nk, 64, 64)
    assert columns.shape[-1] == mask.nk and torch.equal(again.keep(), mask.keep())
    assert (columns[0, 0, 0].sort().values == columns[0, 0, 0]).all()


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "flex"])
def test_each_kernel_is_right_or_says_why_not(name, device):
    problem = small_problem(device, 150)
    masked = Masked("random", problem.mask("random", 0.4) if KERNELS[name].sparse else None)
    row, attend = checked(name, problem.tensors(), masked, lambda attend: 1.0)
    assert (row.note is None) == (attend is not None) == (row.ms == 1.0)
    if attend is None:
        assert not row.note.startswith("TypeError") and len(row.note) > 5, row.note
    if name in ("gather", "reference", "sdpa"):
        assert row.note is None and row.error < 1e-5 and row.tflops > 0


def test_kernels_on_the_masks_of_every_method(cli, tmp_path):
    csv_file, png = tmp_path / "rows.csv", tmp_path / "roofline.png"
    command = ("bench", "kernels", "--shape", "tiny", "--block", "64", "--device", "cpu")
    words = ("--density", "0.4", "--kernel", "gather", "--kernel", "sdpa", "--kernel", "fa4")
    done = cli(*command, *words, "--csv", csv_file, "--png", png)
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader(csv_file.open()))
    sparse = [row for row in rows if row["kernel"] == "gather"]
    assert [row["pattern"] for row in sparse] == [*PATTERNS, *METHODS]
    assert all(float(row["ms"]) > 0 and float(row["error"]) < 1e-5 for row in sparse)
    assert all(row["shape"] == "tiny" and row["commit"] for row in rows)
    assert "fa4: " in done.output
    assert png.read_bytes().startswith(b"\x89PNG")


def test_module_by_itself(monkeypatch, capsys):
    words = "--cpu --tokens 500 --heads 2 --dim 64 --density 0.4 --block 64 --dtype fp32"
    monkeypatch.setattr("sys.argv", ["bench", *words.split()])
    bench_main.main()
    said = capsys.readouterr().out
    # Each row as soon as it is known, then the table.
    assert said.count("gather") == 4 and said.count("sdpa") == 4 and "commit" in said


def test_passes_before_attention_agree(device):
    """Each way of `--prepare` does the same to its rows, but for the order."""
    problem = Problem(2, 12, 16, 64, torch.float32, device)
    calls = {
        name: call for name, _, call in bench_prepare.passes(problem) if "compiled" not in name
    }
    for of in ("all heads", "each head"):
        expected = calls[f"torch, {of}"]()
        assert torch.allclose(calls[f"one pass, {of}"](), expected, atol=1e-5)
        moved = calls[f"one pass with an order, {of}"]()
        assert moved.sum().item() == pytest.approx(expected.sum().item(), abs=1e-2)
        assert torch.allclose(calls[f"one pass with an order and block means, {of}"](), moved)
    assert calls["rows back"]().shape == (1, 12, 32)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "wan"), "--model must be one of wan2.1-14b"),
        (("--size", "big"), "--size must be HEIGHTxWIDTH"),
        (("--size", "120x128"), "--size 120x128 .*multiple of 16 pixels"),
        (("--frames", "16"), "1 more than a multiple of 4"),
        (("--layers", "0"), "--layers must be at least 1"),
        (("--method", "radal"), "--method must be one of .*did you mean 'radial'"),
        (("--precision", "int4"), "--precision must be one of bf16"),
        (("--density", "0"), "--density must be above 0"),
        (("--block", "32"), "--block must be one of"),
        (("--device", "cuda:99"), "torch finds"),
        (("--dtype", "int8"), "--dtype must be one of"),
    ],
)
def test_bad_requests_end_in_one_line(words, message, cli):
    check_bad(cli("bench", "model", "--model", "tiny", "--device", "cpu", *words), message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would be measured")
def test_a_forward_of_hours_is_refused_unless_asked_for(cli):
    asked = ("bench", "model", "--model", "wan2.1-14b", "--layers", "2")
    check_bad(cli(*asked), "2 layers at 75,600 tokens is 0.23 PFLOP, too much")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--shape", "wan"), "--shape must be one of wan-480p"),
        (("--kernel", "tritn"), "--kernel must be one of .*did you mean 'triton'"),
        (("--pattern", "dense"), "--pattern must be one of local"),
        (("--density", "2"), "--density must be above 0 and at most 1, got 2"),
        (("--seconds", "0"), "--seconds must be above 0, got 0"),
    ],
)
def test_bad_requests_for_kernels_end_in_one_line(words, message, cli):
    check_bad(cli("bench", "kernels", "--device", "cpu", *words), message)


def check_bad(done, message: str) -> None:
    assert done.exit_code == 2
    assert re.search(message, done.stderr) and len(done.stderr.splitlines()) == 1, done.stderr
