"""`vdit-sparse bench`: small models and shapes, on the machine that there is."""

import csv
import re

import pytest
import torch

from vdit_sparse.app.bench_model import Row, _judged
from vdit_sparse.methods import METHODS
from vdit_sparse.pipelines.random_model import (
    SIZES,
    ModelSize,
    random_inputs,
    random_transformer,
)

WAN = {"num_attention_heads": 2, "attention_head_dim": 64, "ffn_dim": 64, "freq_dim": 32}
HUNYUAN = {"num_attention_heads": 2, "attention_head_dim": 24, "rope_axes_dim": (4, 10, 10)}
TINY = {
    "tiny": ModelSize("WanTransformer3DModel", 2, {**WAN, "text_dim": 16}, text=8),
    "tiny-joint": ModelSize(
        "HunyuanVideoTransformer3DModel",
        3,
        {**HUNYUAN, "text_embed_dim": 16},
        text=8,
        joint=True,
    ),
}
VIDEO = ("--size", "128x128", "--frames", "17", "--block", "64", "--density", "0.4")


@pytest.fixture(autouse=True)
def tiny_sizes(monkeypatch):
    for name, size in TINY.items():
        monkeypatch.setitem(SIZES, name, size)


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
        *(f"{name} bf16" for name in METHODS),
    ]
    assert not any(row["error"] for row in rows)
    dense = rows[0]
    for row in rows:
        assert row["model"] == "tiny" and row["tokens"] == "320" and row["commit"]
        assert 0 < float(row["attention"]) < float(row["ms"])
        assert float(row["speedup"]) == pytest.approx(float(dense["ms"]) / float(row["ms"]))
        assert row["name"] in done.output
    assert float(rows[3]["density"]) == pytest.approx(0.4)
    cli(*command, "--rounds", 1, "--method", "radial", "--csv", file)
    assert len(list(csv.DictReader(file.open()))) == len(rows) + 2


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
    judged = _judged(sparse, best, 60.0)
    assert judged.bound == pytest.approx(100 / (40 + 15)) and judged.speedup == 2
    assert _judged(Row("x", error="why"), best, 60.0).bound is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "wan"), "--model must be one of wan2.1-14b"),
        (("--size", "big"), "--size must be HEIGHTxWIDTH"),
        (("--size", "120x128"), "--size 120x128 .*multiples of 16 pixels"),
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
    done = cli("bench", "model", "--model", "tiny", "--device", "cpu", *words)
    assert done.exit_code == 2
    assert re.search(message, done.stderr) and len(done.stderr.splitlines()) == 1, done.stderr
