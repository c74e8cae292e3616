"""`vdit-sparse estimate` and `models`: numbers that runs and plans confirm, and bad input."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from tests.tiny_models import WAN_CALL, tiny_wan
from vdit_sparse.app import models
from vdit_sparse.app.estimate_method import Run, sparsity, with_density
from vdit_sparse.app.options import InputError, parse_run
from vdit_sparse.call import Call
from vdit_sparse.grid import Grid
from vdit_sparse.methods import METHODS, DraftAttention, RadialAttention, RettentionAttention
from vdit_sparse.pipelines import sources
from vdit_sparse.pipelines.anatomy import anatomy_of
from vdit_sparse.pipelines.attach import apply, summary
from vdit_sparse.pipelines.checkpoints import checkpoints

ROOT = Path(__file__).parents[2]
WAN = ("--model", "wan2.2-t2v-a14b", "--size", "720x1280", "--num-frames", 81)


def data_of(cli, *words):
    result = cli("estimate", *words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_command_of_the_issue(cli):
    shown = cli("estimate", *WAN, "--method", "radial")
    assert shown.exit_code == 0, shown.output
    for words in ("21 x 45 x 80 = 75,600", "591 of 128 tokens", "2 experts", "exact", "Amdahl"):
        assert words in " ".join(shown.stdout.split()), words
    data = data_of(cli, *WAN, "--preset", "radial-wan2.2")
    grid = Grid(21, 45, 80)
    method = parse_run(None, [], "radial-wan2.2").method
    density = method.keep(grid).float().mean().item()
    sparse = data["sparsity"]
    assert sparse["density"] == pytest.approx(density) and sparse["blocks"] == 1182
    # 11 of 40 steps and 1 of 40 layers are dense.
    share = 29 * 39 / 1600
    assert sparse["run"] == pytest.approx(share * density + 1 - share)
    attention = 4 * 40 * 75_600**2 * 5120
    assert data["attention_flops"] == attention
    saved = data["attention_share"] * (1 - sparse["run"])
    assert data["bound"] == pytest.approx(1 / (1 - saved)) and 1 < data["bound"] < 3
    memory = data["memory"]
    assert memory["transformer"] == memory["transformer_2"] == pytest.approx(14.29e9 * 2, rel=0.01)
    everything = sum(memory.values())
    device = data["device_bytes"]
    assert device["none"] == everything > device["model"] > device["group"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_an_estimate(name, cli):
    words = () if name == "radial" else ("--density", 0.25)
    small = ("--model", "wan2.1-t2v-1.3b", "--method", name)
    data = data_of(cli, *small, *words)
    assert 0 < data["sparsity"]["run"] <= 1 and data["sparsity"]["density"] < 0.4
    assert data["sparsity"]["memory"]["lists"] > 0
    if name in ("paro", "sparse-vdit"):
        unknown = data_of(cli, *small)
        assert unknown["sparsity"]["density"] is None and unknown["bound"] is None
        assert "unknown" in cli("estimate", *small).stdout


@pytest.mark.parametrize("name", ["radial", "rettention", "adaspa", "draft"])
def test_a_run_has_the_density_that_was_estimated(name):
    """The first two to the last digit, the others by their knobs."""
    fields = {"block": 64, "dense_steps": 1, "last_dense_layers": 1}
    method = dataclasses.replace(METHODS[name](), **fields)
    if name == "rettention":
        method = dataclasses.replace(method, refresh=2)
    pipe = tiny_wan(layers=3)
    apply(pipe, method)
    call = {**WAN_CALL, "num_inference_steps": 5}
    pipe(**call)
    done = summary(pipe)
    anatomy = anatomy_of(pipe.transformer, joint=False)
    found = sparsity(method, Grid(5, 8, 8), anatomy, Run(5, branches=2, rows=1))
    exact = name in ("radial", "rettention")
    assert found.run == pytest.approx(done.density, abs=1e-6 if exact else 0.12)
    if exact:
        assert found.density == pytest.approx(done.sparse_density if name == "radial" else 1.0)
    assert found.calls == 15 and found.source.startswith("exact" if exact else "about")


def test_what_a_method_keeps_is_counted():
    pipe = tiny_wan(layers=3)
    grid, anatomy = Grid(5, 8, 8), anatomy_of(pipe.transformer, joint=False)
    run = Run(5, branches=2, rows=1)
    radial = RadialAttention(block=64)
    mask = radial.plan(torch.empty(0), torch.empty(0), Call(grid, 0, 3, 0, 5, memory={})).mask
    assert sparsity(radial, grid, anatomy, run).memory == {"lists": 4 * (mask.idx.numel() + 5)}
    kept = RettentionAttention(block=64)
    about = (grid, anatomy.heads, anatomy.head_dim, 3)
    residuals = kept.memory(*about, branches=2)
    assert sparsity(kept, grid, anatomy, run).memory["residuals"] == residuals > 0
    away = RettentionAttention(block=64, offload=True)
    assert sparsity(away, grid, anatomy, run).memory["residuals in RAM"] == residuals
    ragged = sparsity(DraftAttention(), Grid(21, 45, 80, 10), anatomy, run)
    assert ragged.blocks == -(-(21 * 45 * 80 + 10) // 128)


def test_folders_and_the_bundled_model(cli, tiny_model):
    own = data_of(cli)
    assert own["grid"]["tokens"] == 7 * 16 * 28 and own["steps"] == 16
    assert own["model"]["text"] == 64 and own["memory"]["text encoders"] > 0
    words = ("--model", tiny_model, "--size", "128x128", "--num-frames", 17)
    tiny = data_of(cli, *words, "--method", "dense", "--steps", 7)
    assert tiny["grid"]["tokens"] == 320 and tiny["steps"] == 7 and tiny["sparsity"] is None
    parameters = sum(x.numel() for x in tiny_wan().transformer.parameters())
    assert tiny["memory"]["transformer"] >= 2 * parameters
    wider = data_of(cli, *words, "--dtype", "fp32", "--method", "dense")
    assert wider["memory"]["transformer"] == 4 * parameters


BAD = {
    "size": (("--size", "710x1280"), "wan.* 710x1280x81: height .*16 pixels.* 704 and 720"),
    "frames": (("--num-frames", 80), "nearest: 77 and 81"),
    "size word": (("--size", "big"), "--size must be HEIGHTxWIDTH"),
    "steps": (("--steps", 0), "--steps must be at least 1"),
    "density": (("--method", "draft", "--density", 2), "--density must be above 0"),
    "density of radial": (("--density", 0.5), "follows from its geometry"),
    "density of adaspa": (("--method", "adaspa", "--density", 0.9), "--density: .*2/3"),
    "method": (("--method", "radal"), "did you mean 'radial'"),
    "dtype": (("--dtype", "int8"), "--dtype must be one of"),
    "model": (("--model", "wan2.1-t2v-15b"), "Did you mean wan2.1-t2v-1"),
    "folder": (("--model", "/no/such/folder"), "no model folder"),
    "no model": (("--model", "{tmp}"), "no model_index.json"),
    "images": (("--model", "flux1-dev"), "radial does not run .* an image is one frame"),
    "video of images": (("--model", "flux1-dev", "--num-frames", 5), "makes images"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, cli, tmp_path):
    words, message = BAD[case]
    words = [str(word).format(tmp=tmp_path) for word in words]
    base = () if "--model" in words else ("--model", "wan2.1-t2v-14b")
    result = cli("estimate", *base, *words)
    assert result.exit_code == 2 and not result.stdout, result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and re.search(message, lines[0]), lines


def test_a_model_on_the_hub_needs_only_its_configurations(cli, tiny_model, monkeypatch):
    asked = []

    def fetch(repo, name):
        asked.append(name)
        file = tiny_model / name
        if not file.is_file():
            raise FileNotFoundError(f"{repo} has no {name}")
        return str(file)

    monkeypatch.setattr(sources, "hf_hub_download", fetch)
    data = data_of(cli, "--model", "some/wan", "--size", "128x128", "--num-frames", 17)
    assert data["grid"]["tokens"] == 320
    assert asked and all(name.endswith(".json") for name in asked)


def test_too_few_steps_for_a_method():
    anatomy = anatomy_of(tiny_wan().transformer, joint=False)
    method = RadialAttention(dense_steps=5)
    found = sparsity(method, Grid(5, 8, 8), anatomy, Run(4, 2, 1))
    assert found.sparse_calls == 0 and found.run == 1
    with pytest.raises(InputError, match="--density"):
        with_density(method, 0.5)


def test_models_lists_every_checkpoint(cli):
    result = cli("models")
    assert result.exit_code == 0
    data = json.loads(cli("models", "--json").stdout)
    names = [one["name"] for found in data.values() for one in found]
    assert sorted(names) == sorted(one.name for one in checkpoints())
    shown = "".join(result.stdout.split())
    assert all(name in shown for name in names)


def test_tables_in_the_documents_are_up_to_date():
    assert models.stale(ROOT) == [], f"run {models.COMMAND}"


def test_a_stale_table_is_found_and_written(tmp_path):
    (tmp_path / "docs").mkdir()
    for name in models.TABLES:
        (tmp_path / name).write_text(f"before\n{models.BEGIN}\nold\n{models.END}\nafter\n")
    assert models.stale(tmp_path) == list(models.TABLES)
    assert models.stale(tmp_path, write=True) and models.stale(tmp_path) == []
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "wan2.2-t2v-a14b" in text and "`radial-wan2.2`" in text
    (tmp_path / "README.md").write_text("no table")
    with pytest.raises(ValueError, match="README.md needs the lines"):
        models.stale(tmp_path)
