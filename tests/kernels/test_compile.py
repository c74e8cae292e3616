"""Every kernel compiles for every GPU without one: no spills, and the matrix instructions."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.compile_quant import LAUNCHES

ROOT = Path(__file__).parents[2]
MATRIX_INSTRUCTIONS = {
    "sm_80": "mma.sync",
    "sm_89": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "sm_120": "mma.sync",
    "gfx942": "v_mfma",
}
SHARED_KIB = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}


def compiled(*options: str) -> list[dict]:
    """Rows of compile_kernels.py, from a process where Triton compiles and does not interpret."""
    script = str(Path(__file__).with_name("compile_kernels.py"))
    command = ["env", "-u", "TRITON_INTERPRET", f"PYTHONPATH={ROOT}", sys.executable, script]
    done = subprocess.run([*command, "--json", *options], capture_output=True, text=True)
    if done.returncode:
        pytest.fail(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def check(row: dict) -> None:
    assert row["spilled_bytes"] == 0, row
    assert row["shared_bytes"] <= SHARED_KIB[row["arch"]] * 1024, row
    # What quantises only reads, rounds and writes.
    if row["dtype"] != "fp32" and row["kernel"] not in LAUNCHES:
        assert MATRIX_INSTRUCTIONS[row["arch"]] in row["instructions"], row
    assert ("cp.async.bulk.tensor" in row["instructions"]) == ("tma" in row["tile"]), row


def test_main_variants_compile_everywhere():
    rows = compiled("--quick")
    assert {row["arch"] for row in rows} == set(MATRIX_INSTRUCTIONS)
    for row in rows:
        check(row)
    hopper = [row for row in rows if row["arch"] == "sm_90"]
    assert all("tma" in row["tile"] for row in hopper)


@pytest.mark.slow
def test_all_variants_compile_everywhere():
    for row in compiled():
        check(row)
