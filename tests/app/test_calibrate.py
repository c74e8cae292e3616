"""`vdit-sparse calibrate` from words to a file that `generate` uses, on a tiny random model."""

import json
import re

import pytest

from vdit_sparse.app import calibrate
from vdit_sparse.app.calibrate import parse_seeds, read_prompts
from vdit_sparse.app.catalogue import source
from vdit_sparse.app.options import InputError
from vdit_sparse.calibration import load
from vdit_sparse.eval.calibrators import CALIBRATORS
from vdit_sparse.methods import METHODS

SMALL = ["--size", "128x128", "--num-frames", 17, "--steps", 2, "--device", "cpu"]
SMALL += ["--dtype", "fp32"]
PROMPTS = "# what the search sees\n\na cat runs\n  a dog sits\t\n"


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(PROMPTS)
    return file


@pytest.fixture
def words(tiny_model, tmp_path, prompts):
    """Those of a command that works."""
    out = tmp_path / "new" / "x.safetensors"
    words = ["--method", "paro", "--prompts", prompts, "--model", tiny_model, "--out", out]
    return ["calibrate", *words, *SMALL]


def lines_of(result) -> list[str]:
    """Its lines on stderr without progress bars."""
    lines = [line for line in result.stderr.splitlines() if line.strip() and "it/s" not in line]
    return [line for line in lines if not re.match("(loading|run|paro)", line)]


def test_a_file_is_made_and_used(cli, words, tmp_path, tiny_model):
    out = tmp_path / "new" / "x.safetensors"
    result = cli(*words, "--seeds", "0-1", "--set", "density=0.5", "--set", "bins=1")
    assert result.exit_code == 0, result.output
    found = load(out)
    assert found.method == "PAROAttention" and found.steps == 2
    assert found.fields["density"] == 0.5 and found.fields["bins"] == 1
    assert found.prompts == ("a cat runs", "a dog sits") and found.seeds == (0, 1)
    assert found.origin.model == tiny_model.name
    size, made_for, made_from, density, use = result.stdout.splitlines()
    assert size == f"{out}: {out.stat().st_size / 1e3:,.1f} kB"
    assert made_for == "made for: 5 x 8 x 8 tokens, 2 layers, 2 steps"
    assert made_from == "made from: prompts 2, seeds 2"
    assert re.match(r"density: 0\.\d{3}, ", density)
    assert f"--method paro --set calibration={out}" in use
    for run in range(1, 9):  # two passes
        assert f"run {run}/8" in result.stderr

    video = ["generate", "--prompt", "a cow", "--model", tiny_model, "--method", "paro"]
    video += ["--set", f"calibration={out}"]
    done = cli(*video, *SMALL, "--out", tmp_path / "a")
    assert done.exit_code == 0 and not lines_of(done), done.output
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert f"density: {report['runs'][0]['density']:.3f}, " in density
    # The same with more steps: one warning, whatever the number of layers, steps and runs.
    done = cli(
        *video,
        *SMALL,
        "--steps",
        3,
        "--compare",
        f"paro:calibration={out}",
        "--out",
        tmp_path / "b",
    )
    (warning,) = lines_of(done)
    assert warning.startswith("Warning: ") and "steps of the file 2, of this run 3" in warning
    # Another size, and no file at all.
    done = cli(*video, *SMALL, "--size", "128x64", "--out", tmp_path / "c")
    assert done.exit_code == 2 and "were asked for" in lines_of(done)[-1]
    done = cli(*video[:-2], *SMALL, "--out", tmp_path / "c")
    assert done.exit_code == 2 and "needs a calibration" in lines_of(done)[-1]
    assert not (tmp_path / "c").exists()


def test_a_former_file_is_left_alone_unless_told(cli, words, tmp_path):
    out = tmp_path / "x.safetensors"
    out.write_text("mine")
    refused = cli(*words, "--out", out)
    assert refused.exit_code == 2 and "--overwrite" in refused.stderr
    assert out.read_text() == "mine"
    assert cli(*words, "--out", out, "--overwrite").exit_code == 0
    assert load(out).steps == 2


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, 1), (KeyboardInterrupt, 130)])
def test_a_failure_leaves_no_file(cli, words, tmp_path, monkeypatch, error, status):
    def breaks(*_, **__):
        raise error("the GPU is on fire")

    monkeypatch.setattr(calibrate, "search_for", breaks)
    result = cli(*words)
    assert result.exit_code == status and "Traceback" not in result.output
    assert ("on fire" if status == 1 else "Interrupted") in lines_of(result)[-1]
    assert not list((tmp_path / "new").iterdir())


def test_a_failure_after_the_search_leaves_the_file(cli, words, tmp_path, monkeypatch):
    def breaks(*_, **__):
        raise RuntimeError("the GPU is on fire")

    monkeypatch.setattr(calibrate, "density_of", breaks)
    result = cli(*words)
    assert result.exit_code == 1 and "which is written" in lines_of(result)[-1]
    assert load(tmp_path / "new" / "x.safetensors").steps == 2


def test_an_image_model_needs_an_image(cli, words, tiny_image_model, tmp_path):
    result = cli(*words, "--model", tiny_image_model)
    assert result.exit_code == 2 and "give one with --image" in lines_of(result)[-1]


BAD = {
    "no method": (["--method", "pro"], "did you mean 'paro'.*: paro, sparse-vdit"),
    "needless": (["--method", "radial"], "radial needs no calibration: use it as it is"),
    "dense": (["--method", "dense"], "no method 'dense' to calibrate"),
    "field": (["--set", "densty=1"], "no field 'densty' .did you mean 'density'"),
    "value": (["--set", "density=2"], "density must be a finite number above 0 and at most 1"),
    "word": (["--set", "density=much"], "density must be a number, got 'much'"),
    "prompts": (["--prompts", "{tmp}/no.txt"], "Cannot read --prompts .*no.txt .No such file"),
    "prompts folder": (["--prompts", "{tmp}"], "Cannot read --prompts"),
    "empty prompts": (["--prompts", "{tmp}/empty.txt"], "has no prompts: write one on each line"),
    "seeds": (["--seeds", "0;1"], "--seeds must be numbers such as 0,1 or 0-3, got '0;1'"),
    "steps": (["--steps", 0], "--steps must be at least 1"),
    "size": (["--size", "120x128"], "multiple of 16 pixels"),
    "device": (["--device", "gpu"], "--device must be cpu"),
    "offload": (["--offload", "modle"], "did you mean 'model'"),
    "suffix": (["--out", "{tmp}/x.pt"], r"must end in \.safetensors"),
    "out is a folder": (["--out", "{tmp}/folder.safetensors"], "is a folder: name a file"),
    "out in a file": (["--out", "{tmp}/empty.txt/x.safetensors"], "Cannot write --out"),
    "unknown option": (["--stps", 3], "No such option: --stps"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, cli, words, tmp_path, monkeypatch):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    changed, message = BAD[case]
    monkeypatch.setattr("vdit_sparse.pipelines.load.load_pipeline", None)  # it is not loaded
    result = cli(*words, *(str(word).format(tmp=tmp_path) for word in changed))
    assert result.exit_code == 2, result.output
    (line,) = lines_of(result)
    assert re.search(message, line), line
    assert not result.stdout


@pytest.mark.parametrize("missing", ["--method", "--prompts", "--out"])
def test_what_is_required_is_named(cli, words, missing):
    at = words.index(missing)
    result = cli(*words[:at], *words[at + 2 :])
    assert result.exit_code == 2 and missing in lines_of(result)[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a cat\n\na d\xffg\n", "line 3: this is no UTF-8 text"),
        (b"a cat\n# a cat\n a cat\n", "line 3: line 1 has the same prompt"),
        (b"a cat\na\x00dog", "line 2: there are control characters"),
        (b"", "has no prompts"),
    ],
)
def test_bad_prompts_are_told_by_line(tmp_path, content, message):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_prompts(tmp_path / "p.txt")


def test_prompts_are_text_of_any_script(tmp_path):
    text = "\ufeffein Hund läuft\r\n一只猫\n👩\u200d🚀 # floats\n"
    (tmp_path / "p.txt").write_bytes(text.encode())
    assert read_prompts(tmp_path / "p.txt") == ("ein Hund läuft", "一只猫", "👩\u200d🚀 # floats")


@pytest.mark.parametrize(
    ("text", "seeds"), [("0", (0,)), ("0,1", (0, 1)), ("0-3", (0, 1, 2, 3)), ("4-5, 0", (4, 5, 0))]
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "-1", "1.5", "0,", "3-1", "0-1000", "0-2,1", str(2**63)])
def test_bad_seeds(text):
    with pytest.raises(InputError, match="--seeds"):
        parse_seeds(text)


def test_methods_lists_papers_and_who_needs_a_calibration(cli):
    content = json.loads(cli("methods", "--json").stdout)
    listed = {method["name"]: method for method in content["methods"]}
    assert list(listed) == list(METHODS)
    for name, method in listed.items():
        assert re.fullmatch(r".+, arXiv \d{4}\.\d{5}", method["source"]), name
        assert method["calibrated"] == (name in CALIBRATORS) == bool(method["search"])
    assert listed["radial"]["source"] == "Radial Attention, arXiv 2506.19852"
    fields = {field["name"]: field["default"] for field in listed["paro"]["search"]}
    assert fields["mode"] == "threshold"
    shown = cli("methods").stdout
    assert "Radial Attention, arXiv 2506.19852" in shown and "calibrate --method" in shown


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "One line.\n\n    Source: The Paper:\n    a study, arXiv 2501.01234v2 and the code.",
            "The Paper: a study, arXiv 2501.01234",
        ),
        ("One line, arXiv 2501.01234.", None),
        ("", None),
    ],
)
def test_a_source_is_read_off_a_docstring(text, found):
    assert source(text) == found
