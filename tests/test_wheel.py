"""The wheel, installed alone and run from elsewhere, makes a video with the bundled model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_generates_outside_of_the_checkout(tmp_path):
    build = "import hatchling.build as b, sys; b.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], check=True, cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    home = tmp_path / "installed"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(home), str(wheel)]
    subprocess.run([sys.executable, *install], check=True, cwd=tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(home)}
    where = "import vdit_sparse.kernels.block_mask as m; print(m.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", where], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert found.stdout.strip().startswith(str(home))
    words = "generate --prompt balloon --steps 2 --size 64x64 --num-frames 5 --compare dense"
    words += " --set block=64 --out made"
    subprocess.run(
        [sys.executable, "-m", "vdit_sparse.app.cli", *words.split()],
        env=environment,
        cwd=tmp_path,
        check=True,
    )
    report = json.loads((tmp_path / "made" / "report.json").read_text())
    assert report["status"] == "finished" and report["model"]["name"] == "bundled"
    assert (tmp_path / "made" / "side_by_side.mp4").stat().st_size > 1000
