"""`vdit-sparse inspect` from words to pictures, on a tiny random model."""

import base64
import json
import re

import pytest
from PIL import Image

from vdit_sparse.app import inspect
from vdit_sparse.app.inspect import parse_numbers, sparse_steps
from vdit_sparse.app.options import InputError
from vdit_sparse.methods import AdaSpaAttention, RadialAttention

SMALL = ["--size", "128x128", "--num-frames", 17, "--num-inference-steps", 4, "--device", "cpu"]
DRAFT = ["--method", "draft", "--set", "block=64", "--set", "dense_steps=1"]


@pytest.fixture
def words(tiny_model, tmp_path):
    """Those of a command that works."""
    words = ["--prompt", "a cat runs", "--model", tiny_model, "--out", tmp_path / "new" / "x"]
    return ["inspect", *words, *SMALL, *DRAFT, "--dtype", "fp32"]


def lines_of(result) -> list[str]:
    """Its lines on stderr without progress bars."""
    lines = [line for line in result.stderr.splitlines() if line.strip() and "it/s" not in line]
    return [line for line in lines if not re.match("(loading|looking)", line)]


def test_pictures_and_numbers_are_written(cli, words, tmp_path, tiny_model):
    out = tmp_path / "new" / "x"
    result = cli(*words, "--steps", "0,2", "--heads", 1, "--seed", 3)
    assert result.exit_code == 0, result.output
    names = {"inspect.html", "inspect.json", "density.png", "recall.png"}
    names |= {"maps-step-00.png", "maps-step-02.png"}
    assert {file.name for file in out.iterdir()} == names
    dense, sparse, *files = result.stdout.splitlines()
    assert set(files) == {str(out / name) for name in names}
    assert dense.startswith("step 0: density 1.000, recall 1.000 (best 1.000), error 0.000")
    assert re.match(r"step 2: density 0\.\d{3}, recall 0\.\d{3} \(best 0\.\d{3}\), error", sparse)

    data = json.loads((out / "inspect.json").read_text())
    assert data["prompt"] == "a cat runs" and data["seed"] == 3 and data["steps"] == 4
    assert data["grid"] == [5, 8, 8, 0] and data["measured_steps"] == [0, 2]
    assert data["model"]["name"] == str(tiny_model) and data["model"]["dtype"] == "float32"
    assert [row["why"] for row in data["dense"]] == ["dense_steps"] * 2
    assert data["density_of_steps"]["0"] == 1 > data["density_of_steps"]["1"]
    for name in ("density", "recall", "best", "error"):
        values = data[name]
        assert [len(values), len(values[0]), len(values[0][0])] == [2, 2, 2]
    mean = sum(map(sum, data["recall"][1])) / 4
    assert f"recall {mean:.3f} (best" in sparse

    page = (out / "inspect.html").read_text()
    assert "What draft dense_steps=1 block=64 visits" in page and "a cat runs" in page
    embedded = [base64.b64decode(x) for x in re.findall("base64,([^']+)'", page)]
    pictures = [name for name in names if name.endswith("png")]
    assert sorted(embedded) == sorted((out / name).read_bytes() for name in pictures)
    assert "src='http" not in page and "<script" not in page


def test_pictures_show_what_was_measured(cli, words, tmp_path):
    result = cli(*words, "--steps", "2", "--heads", "all", "--layers", "0")
    assert result.exit_code == 0, result.output
    colours = {}
    for name in ("maps-step-02", "recall", "density"):
        with Image.open(tmp_path / "new" / "x" / f"{name}.png") as picture:
            colours[name] = picture.getcolors(2**24)
    # The ends of the scale are a dropped and a visited block.
    shown = {colour for _, colour in colours["maps-step-02"]}
    assert {(18, 20, 48), (255, 250, 190)} <= shown
    # A dot for the one step that was measured.
    dots = sum(count for count, colour in colours["density"] if colour == (213, 94, 0))
    assert 50 < dots < 120


def test_a_few_are_shown_where_none_are_named(cli, words, tmp_path):
    result = cli(*words)
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "new" / "x" / "inspect.json").read_text())
    assert data["measured_steps"] == [1, 2, 3]
    again = cli(*words)
    assert again.exit_code == 2 and "--overwrite" in again.stderr
    assert cli(*words, "--steps", "3", "--overwrite").exit_code == 0
    names = {file.name for file in (tmp_path / "new" / "x").iterdir()}
    assert "maps-step-03.png" in names and "maps-step-01.png" not in names


BAD = {
    "dense": (["--method", "dense"], "dense visits everything"),
    "method": (["--method", "drft"], "did you mean 'draft'"),
    "layers": (["--layers", "0;1"], "--layers must be all or numbers such as 0,5 or 0-3"),
    "falling": (["--heads", "3-1"], "--heads must be all or numbers"),
    "prompt": (["--prompt", " "], "--prompt is empty"),
    "steps": (["--num-inference-steps", "0"], "--num-inference-steps must be at least 1"),
    "unknown option": (["--compare", "dense"], "No such option: --compare"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, cli, words, monkeypatch):
    changed, message = BAD[case]
    if case == "dense":
        words = [word for word in words if word not in DRAFT]
    monkeypatch.setattr("vdit_sparse.pipelines.load.load_pipeline", None)  # it is not loaded
    result = cli(*words, *changed)
    assert result.exit_code == 2, result.output
    (line,) = lines_of(result)
    assert re.search(message, line), line
    assert not result.stdout


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--layers", "0,2"], "--layers must be from 0 to 1, got 2."),
        (["--heads", "0-5"], "--heads must be from 0 to 1, got 5."),
        (["--steps", "4"], "--steps must be from 0 to 3, got 4."),
    ],
)
def test_what_the_model_does_not_have_is_one_line(changed, message, cli, words, tmp_path):
    result = cli(*words, *changed)
    assert result.exit_code == 2 and lines_of(result)[-1] == message
    assert not any((tmp_path / "new" / "x").iterdir())


def test_a_failure_leaves_nothing_behind(cli, words, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(inspect, "look", fail)
    result = cli(*words)
    assert result.exit_code == 1
    assert lines_of(result)[-1] == "RuntimeError: out of memory (nothing was written)"
    assert not any((tmp_path / "new" / "x").iterdir())


@pytest.mark.parametrize(
    ("text", "numbers"), [(None, ()), ("all", None), ("0,5", (0, 5)), ("2-4, 3,0", (2, 3, 4, 0))]
)
def test_numbers(text, numbers):
    assert parse_numbers("layers", text) == numbers


@pytest.mark.parametrize("text", ["", "-1", "1.5", "0,", "none", "0-999999"])
def test_bad_numbers(text):
    with pytest.raises(InputError, match="--steps"):
        parse_numbers("steps", text)


def test_sparse_steps():
    assert sparse_steps(RadialAttention(dense_steps=2, last_dense_steps=1), 4, 6) == [2, 3, 4]
    assert sparse_steps(AdaSpaAttention(dense_steps=0.5), 4, 6) == [3, 4, 5]
    assert sparse_steps(RadialAttention(dense_layers=4), 4, 6) == []
