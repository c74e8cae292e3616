"""`vdit-sparse tune` from words to a file that `generate --calibration` uses, on a tiny model."""

import json
import re

import pytest

from vdit_sparse.app import tune
from vdit_sparse.app.options import InputError, parse_calibrated, parse_compare
from vdit_sparse.calibration import load
from vdit_sparse.tuned import TunedAttention

SMALL = ["--size", "128x128", "--num-frames", 17, "--steps", 3, "--device", "cpu"]
SMALL += ["--dtype", "fp32"]
SEARCH = ["--effects", "none", "--rounds", 0, "--set", "densities=0.0,0.3", "--batch", 2]


@pytest.fixture
def words(tiny_model, tmp_path):
    """Those of a command that works."""
    file = tmp_path / "prompts.txt"
    file.write_text("a cat runs\na dog sits\n")
    out = tmp_path / "new" / "x.safetensors"
    words = ["--prompts", file, "--model", tiny_model, "--out", out, "--density", 0.6]
    return ["tune", *words, *SEARCH, *SMALL]


def lines_of(result) -> list[str]:
    """Its lines on stderr without progress bars."""
    lines = [line for line in result.stderr.splitlines() if line.strip() and "it/s" not in line]
    return [
        line for line in lines if not re.match("(loading|measuring|effects|refining|tuned)", line)
    ]


def test_a_file_is_made_and_used(cli, words, tmp_path, tiny_model):
    out = tmp_path / "new" / "x.safetensors"
    result = cli(*words)
    assert result.exit_code == 0, result.output
    found = load(out)
    assert found.method == "TunedAttention" and found.steps == 3
    assert found.fields["densities"] == [0.0, 0.3] and found.prompts == ("a cat runs", "a dog sits")
    *_, density, error, use = result.stdout.splitlines()
    assert float(re.match(r"density: (0\.\d{3}), ", density)[1]) <= 0.6
    assert "error of the latents" in error and f"generate --calibration {out}" in use
    video = ["generate", "--prompt", "a cow", "--model", tiny_model, "--calibration", out]
    done = cli(*video, *SMALL, "--out", tmp_path / "a")
    assert done.exit_code == 0 and not lines_of(done), done.output
    (run,) = json.loads((tmp_path / "a" / "report.json").read_text())["runs"]
    assert f"density: {run['density']:.3f}, " in density
    assert run["method"]["fields"]["calibration"] == out.name
    # The same as a method of its own name, and no other.
    assert parse_compare(f"tuned:calibration={out}").method == TunedAttention(calibration=str(out))
    assert parse_calibrated(str(out), None) == "tuned"
    with pytest.raises(InputError, match="is for tuned, but --method is radial"):
        parse_calibrated(str(out), "radial")
    with pytest.raises(InputError, match="There is no calibration file"):
        parse_calibrated(str(tmp_path / "none"), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--speedup", 2], "Give one of --density, --target-psnr and --speedup"),
        (["--density", 1.5], "density must be above 0 and below 1, got 1.5"),
        (["--effects", "all"], "--effects must be one of head, layer, none, got 'all'"),
        (["--rounds", -1], "--rounds must be from 0"),
        (["--batch", 0], "--batch must be from 1"),
        (["--set", "densities=0.5,0.1"], "densities must ascend"),
        (["--set", "depth=1"], "has no field 'depth'"),
        (["--out", "x.txt"], "must end in .safetensors"),
    ],
)
def test_bad_words_are_told_in_one_line(cli, words, changes, message):
    result = cli(*words, *changes)
    assert result.exit_code == 2
    assert message in " ".join(lines_of(result)[-1].split())


def test_another_model_needs_prompts(cli, words, tiny_model):
    at = words.index("--prompts")
    result = cli(*words[:at], *words[at + 2 :])
    assert result.exit_code == 2 and "--prompts is needed with --model" in lines_of(result)[-1]
    assert len(tune.read_prompts(tune.BUNDLED_PROMPTS)) >= 4


def test_a_density_out_of_reach_leaves_no_file(cli, words, tmp_path):
    result = cli(*words, "--density", 0.1)
    assert result.exit_code == 2
    said = " ".join(result.stderr.split())
    assert "A run of 3 steps has a density of at least 0.333" in said
    assert re.search(r"x-0\.6\.safetensors, \S+x-0\.1\.safetensors were not written\.", said)
    assert not list((tmp_path / "new").iterdir())


def test_several_densities_are_files_of_one_search(cli, words, tmp_path):
    result = cli(*words, "--density", 0.8)
    assert result.exit_code == 0, result.output
    made = [load(tmp_path / "new" / f"x-{density}.safetensors") for density in (0.6, 0.8)]
    assert [each.fields["target"]["density"] for each in made] == [0.6, 0.8]
    said = [float(text) for text in re.findall(r"density: (0\.\d{3}), ", result.stdout)]
    assert 0.5 < said[0] <= 0.6 < said[1] <= 0.8 and result.stdout.count("use it with") == 2
    again = cli(*words, "--density", 0.6)
    assert again.exit_code == 2 and "--density has the same number twice" in lines_of(again)[-1]


def test_what_was_found_before_a_fault_stays(cli, words, tmp_path, monkeypatch):
    from vdit_sparse.eval import tune

    def full(found):
        if "x-0.8" in str(found.path):
            raise OSError("No space left on device")
        save(found)

    save = tune.save
    monkeypatch.setattr(tune, "save", full)
    result = cli(*words, "--density", 0.8)
    assert result.exit_code == 1 and (tmp_path / "new" / "x-0.6.safetensors").exists()
    said = " ".join(result.stderr.split())
    assert re.search(r"No space left on device \(\S+x-0\.8\.safetensors was not written\.", said)


def test_a_psnr_is_reached(cli, words, tmp_path, monkeypatch):
    monkeypatch.setattr("vdit_sparse.eval.tune_problem.HALVINGS", 1)
    at = words.index("--density")
    result = cli(*words[:at], *words[at + 2 :], "--target-psnr", 45)
    assert result.exit_code == 0, result.output
    (said,) = re.findall(r"PSNR on these prompts: (\d+\.\d\d) dB", result.stdout)
    assert float(said) >= 45
    found = load(tmp_path / "new" / "x.safetensors")
    assert found.fields["target"] == {"density": None, "psnr": 45.0, "speedup": None}


def test_a_speedup_out_of_reach_is_one_line(cli, words, tmp_path):
    at = words.index("--density")
    result = cli(*words[:at], *words[at + 2 :], "--speedup", 900)
    assert result.exit_code == 2
    said = " ".join(result.stderr.split())
    assert "The speed-up at density" in said and "ValueError" not in said
    assert re.search(r"expected 900: ask for less\. \S+x\.safetensors was not written\.", said)
    assert not list((tmp_path / "new").iterdir())
