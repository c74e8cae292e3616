"""`vdit-sparse eval vbench`: scores, totals and names; the package `vbench` is not the real one."""

import json
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from vdit_sparse.app import evaluate_vbench
from vdit_sparse.app.video import write_video
from vdit_sparse.eval.files import marked_stem
from vdit_sparse.eval.vbench import (
    DIMENSIONS,
    QUALITY,
    flickering,
    normalised,
    read_frames,
    totals,
    videos_of,
)

ENTRIES = [
    {"prompt_en": "a cat, 'still'", "dimension": ["temporal_flickering"]},
    {"prompt_en": "A fantasy", "dimension": ["overall_consistency", "scene"]},
    {"prompt_en": "a fantasy", "dimension": ["overall_consistency"]},
]
# Says what it was asked for, and fails for one dimension.
FAKE = """
import json, os
class VBench:
    def __init__(self, device, info, out):
        self.device, self.info, self.out = device, info, out
    def evaluate(self, videos_path, name, dimension_list, mode):
        if name == "dynamic_degree":
            raise OSError("no weights raft-things.pth")
        names = sorted(os.listdir(videos_path))
        asked = [str(self.device), self.info, names, mode]
        with open(os.path.join(self.out, name + "_eval_results.json"), "w") as file:
            json.dump({dimension_list[0]: [0.25, asked]}, file)
"""


# Importing the real one takes seconds.
TORCH = """
device = str
class cuda:
    is_available = lambda: False
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Five videos of each prompt, one of them under its marked name."""
    folder = tmp_path_factory.mktemp("made")
    stems = ["a cat, 'still'", "A fantasy", marked_stem("a fantasy")]
    for number, stem in enumerate(stems):
        for index in range(5):
            frames = torch.full((3, 3, 16, 32), 20 * number, dtype=torch.uint8)
            frames[::2] += 10 * (index + 1)
            write_video(folder / f"{stem}-{index}.mp4", frames, 8)
    return folder


@pytest.fixture
def videos(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "radial"))


@pytest.fixture
def info(tmp_path):
    file = tmp_path / "VBench_full_info.json"
    file.write_text(json.dumps(ENTRIES))
    return file


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The Python of an environment that has a package `vbench`."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "vbench.py").write_text(FAKE)
    (tmp_path / "site" / "torch.py").write_text(TORCH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    return sys.executable


def by_hand(file):
    """VBench's formula, on OpenCV's frames in float32 as there. The frames are grey: colours differ
    between OpenCV 4, which VBench needs, and 5."""
    video, frames = cv2.VideoCapture(str(file)), []
    while (read := video.read())[0]:
        frames.append(read[1].astype(np.float32))
    pairs = zip(frames[:-1], frames[1:], strict=True)
    return (255.0 - np.mean([np.mean(cv2.absdiff(x, y)) for x, y in pairs])) / 255.0


def test_flickering_is_vbenchs(videos):
    files = sorted(videos.glob("*.mp4"))
    expected = [by_hand(file) for file in files]
    assert flickering(files) == pytest.approx(np.mean(expected), abs=1e-6)
    assert max(expected) - min(expected) > 0.05


def test_colours_are_those_of_opencv_4(tmp_path):
    """Written as BT.709 and read as BT.601, as VBench does."""
    red, green, blue = 200, 60, 40
    frames = torch.tensor([red, green, blue], dtype=torch.uint8).view(1, 3, 1, 1)
    write_video(tmp_path / "x.mp4", frames.expand(3, 3, 32, 32).contiguous(), 8)
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    cb, cr = (blue - luma) / 1.8556, (red - luma) / 1.5748
    seen = (luma + 1.402 * cr, luma - 0.344136 * cb - 0.714136 * cr, luma + 1.772 * cb)
    found = read_frames(tmp_path / "x.mp4")
    assert found.shape == (3, 3, 32, 32)
    assert found[1, :, 16, 16].tolist() == pytest.approx(seen, abs=3)
    assert abs(seen[0] - red) > 10


def test_without_the_package_there_is_flickering_and_no_total(cli, videos, info):
    result = cli("eval", "vbench", "--videos", videos, "--prompts", info)
    assert result.exit_code == 0, result.output
    found = json.loads((videos.with_name("radial-vbench") / "vbench.json").read_text())
    (score,) = found["dimensions"].values()
    assert score["videos"] == 5 and score["missing"] == 0
    expected = flickering(sorted(videos.glob("a cat*.mp4")))
    assert score["score"] == pytest.approx(expected)
    assert score["normalised"] == pytest.approx((expected - 0.6293) / (1 - 0.6293))
    assert found["totals"] == {"quality": None, "semantic": None, "total": None}
    assert "not all of its dimensions" in result.stdout


def test_missing_videos_are_counted(cli, videos, info, tmp_path):
    (videos / "a cat, 'still'-3.mp4").unlink()
    result = cli("eval", "vbench", "--videos", videos, "--prompts", info, "--out", tmp_path / "o")
    assert "1 videos are missing, the first \"a cat, 'still'-3.mp4\"" in result.stdout
    (videos / "a cat, 'still'-2.mp4").write_text("broken")
    result = cli("eval", "vbench", "--videos", videos, "--prompts", info, "--out", tmp_path / "o")
    assert result.exit_code == 1 and "still'-2.mp4 cannot be decoded" in result.stderr


def test_the_package_runs_in_its_environment(cli, videos, info, package, tmp_path):
    words = ["--videos", videos, "--prompts", info, "--python", package, "--device", "cpu"]
    asked = ["--dimensions", "overall_consistency,dynamic_degree", "--out", tmp_path / "o"]
    entry = {"prompt_en": "A fantasy", "dimension": ["dynamic_degree"]}
    info.write_text(json.dumps([*ENTRIES, entry]))
    result = cli("eval", "vbench", *words, *asked)
    assert result.exit_code == 1
    assert "dynamic_degree: OSError: no weights raft-things.pth" in result.stderr
    found = json.loads((tmp_path / "o" / "vbench.json").read_text())
    assert set(found["dimensions"]) == {"overall_consistency"}
    assert found["dimensions"]["overall_consistency"]["score"] == 0.25
    said = json.loads((tmp_path / "o" / "overall_consistency_eval_results.json").read_text())
    device, list_, names, mode = said["overall_consistency"][1]
    assert (device, list_, mode) == ("cpu", str(info), "vbench_standard")
    # VBench finds what it looks for, under the names that it builds from its prompts.
    wanted = [f"{stem}-{index}.mp4" for stem in ("A fantasy", "a fantasy") for index in range(5)]
    assert names == sorted(wanted)


def test_prompts_of_images_have_no_totals_of_vbench(cli, videos, info, tmp_path):
    entry = {"prompt_en": "a cat, 'still'", "dimension": ["i2v_background", *QUALITY]}
    info.write_text(json.dumps([{**entry, "image_name": "a cat.jpg"}]))
    result = cli("eval", "vbench", "--videos", videos, "--prompts", info)
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "radial-vbench" / "vbench.json").read_text())
    assert set(content["dimensions"]) == {"temporal_flickering"}
    assert "VBench-I2V's" in content["notes"][0] and set(content["totals"].values()) == {None}


def test_totals_are_by_vbenchs_weights():
    scores = dict.fromkeys(DIMENSIONS, 0.5)
    assert totals({x: scores[x] for x in QUALITY})["quality"] is not None
    assert totals({x: scores[x] for x in QUALITY})["total"] is None
    quality = [(0.5 - 0.1462) / 0.8538, (0.5 - 0.2615) / 0.7385, (0.5 - 0.6293) / 0.3707]
    quality += [(0.5 - 0.706) / 0.2915, 0.5, 0.5, 0.25]
    semantic = [0.5] * 5 + [0.5 / 0.8222, 0.4991 / 0.2846, 0.5 / 0.364, 0.5 / 0.364]
    found = totals(scores)
    assert found["quality"] == pytest.approx(sum(quality) / 6.5)
    assert found["semantic"] == pytest.approx(sum(semantic) / 9)
    assert found["total"] == pytest.approx((4 * found["quality"] + found["semantic"]) / 5)
    assert normalised("scene", 0.8222) == 1.0 and normalised("color", 0.3) == 0.3


def test_other_videos_have_the_dimensions_that_need_no_list(cli, videos):
    found = videos_of(videos, "subject_consistency", None)
    assert len(found.files) == 15 and not found.standard
    result = cli("eval", "vbench", "--videos", videos, "--dimensions", "scene")
    assert result.exit_code == 1 and "own prompts only: give --prompts" in result.stderr
    result = cli("eval", "vbench", "--videos", videos, "--dimensions", "motion_smoothness")
    assert result.exit_code == 1 and "eval vbench --setup ENV" in result.stderr


def test_long_videos_are_flagged(cli, tmp_path):
    (tmp_path / "long").mkdir()
    frames = torch.zeros(10, 3, 32, 32, dtype=torch.uint8)
    write_video(tmp_path / "long" / "x-0.mp4", frames, 2)
    result = cli("eval", "vbench", "--videos", tmp_path / "long")
    assert result.exit_code == 0 and "5.00 s long" in result.stdout
    assert "VBench-Long" in result.stdout


def test_the_environment_is_made_by_pip(cli, tmp_path, monkeypatch):
    ran = []

    def run(command, **_):
        ran.append(command)
        return evaluate_vbench.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(evaluate_vbench.subprocess, "run", run)
    monkeypatch.setattr(evaluate_vbench, "_suitable_python", lambda: "/usr/bin/python3.11")
    result = cli("eval", "vbench", "--setup", tmp_path / "env")
    assert result.exit_code == 0 and "detectron2" in result.stdout
    assert ran[0] == ["/usr/bin/python3.11", "-m", "venv", str(tmp_path / "env")]
    assert ran[1][:4] == [str(tmp_path / "env/bin/python"), "-m", "pip", "install"]
    assert {"vbench==0.1.5", "setuptools<81"} <= set(ran[1])
    assert cli("eval", "vbench", "--setup", tmp_path).exit_code == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--videos DIR is missing"),
        (["--videos", "/no/such"], "There is no folder /no/such"),
        (["--videos", ".", "--dimensions", "sceen"], "did you mean 'scene'"),
        (["--videos", ".", "--prompts", "no.json"], "Cannot read no.json"),
        (["--videos", ".", "--python", "no/python"], "no program --python no/python"),
    ],
)
def test_bad_input_is_one_line(cli, words, said):
    result = cli("eval", "vbench", *words)
    assert result.exit_code == 2 and said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_the_driver_has_nothing_of_ours():
    source = Path(evaluate_vbench.by_package.__globals__["DRIVER"]).read_text()
    assert "import vdit_sparse" not in source and "from vdit_sparse" not in source
