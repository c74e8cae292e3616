"""The benchmark of kernels: what it says when something fails or the time is up, and its files."""

import csv
import math
import re
import time

import pytest
import torch

from vdit_sparse.kernels.bench import __main__ as command
from vdit_sparse.kernels.bench import measure, prepare, skip
from vdit_sparse.kernels.bench.measure import Masked, Row, as_data, run
from vdit_sparse.kernels.bench.problem import Problem
from vdit_sparse.kernels.bench.report import append, roofline


@pytest.fixture
def problem(device) -> Problem:
    return Problem(2, 300, 64, 64, torch.float32, device)


def test_no_kernel_is_begun_when_the_time_is_up(problem):
    masks = [Masked("random", problem.mask("random", 0.4))]
    names = ("reference", "sdpa", "fa4")
    rows = run(problem, names, masks, deadline=time.monotonic())
    assert sorted(row.kernel for row in rows) == sorted(names)
    assert all(row.ms is None and row.note == "not begun: the time was up" for row in rows)
    assert {row.kernel: row.density == 1.0 for row in rows}["sdpa"]
    assert all(row.ms > 0 for row in run(problem, ("sdpa",), masks, deadline=math.inf))


def test_rows_are_in_the_file_before_the_run_ends(problem, monkeypatch, tmp_path):
    """A run that is killed leaves what it measured."""
    file = tmp_path / "rows.csv"
    words = f"--tokens 200 --heads 1 --dim 64 --dtype fp32 --density 0.4 --block 64 --csv {file}"
    words += f" --device {problem.device.type} --backends reference sdpa --pattern local random"
    seen = []

    def append_and_look(*row):
        append(*row)
        seen.append(len(list(csv.DictReader(file.open()))))

    monkeypatch.setattr("sys.argv", ["bench", *words.split()])
    monkeypatch.setattr(command, "append", append_and_look)
    command.main()
    assert seen == list(range(1, len(seen) + 1)) and len(seen) >= 3
    header = file.read_text().splitlines()[0].split(",")
    assert len(header) == len(set(header)) and "commit" in header


def test_facts_that_rows_have_too_are_one_column(tmp_path):
    append(tmp_path / "rows.csv", [{"kernel": "x", "dtype": "bf16"}], {"dtype": "bf16", "gpu": "y"})
    assert (tmp_path / "rows.csv").read_text().splitlines() == ["kernel,dtype,gpu", "x,bf16,y"]


def test_a_roof_rises_to_its_peak(problem, monkeypatch, tmp_path):
    """Left of the ridge memory limits, 206 FLOP a byte for bf16 on an H200."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn = []
    monkeypatch.setattr(figure, "savefig", lambda self, *_, **__: drawn.append(self.axes[0]))
    rows = [Row("a", "local", density, 1.0, 500.0) for density in (0.1, 1.0)]
    data = [row | {"tokens": tokens} for row in as_data(problem, rows) for tokens in (500, 80_000)]
    roofline(data, "NVIDIA H200", tmp_path / "roofline.png")
    lines = {each.get_label(): each.get_data() for each in drawn[0].lines}
    places, roof = lines["peak, bf16"]
    assert min(places) < 206 < max(places) and max(roof) == 989
    for place, height in zip(places, roof, strict=True):
        assert height == pytest.approx(min(989, 4.8 * place))


def test_a_pass_that_fails_is_a_line(problem, monkeypatch, capsys):
    """An order's share stands beside the attention of the same size."""

    def timed(call):
        call()
        return 1.0

    def broken(*_):
        raise RuntimeError("out of order")

    monkeypatch.setattr(prepare, "time_gpu", timed)
    monkeypatch.setattr(prepare, "stock", broken)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    prepare.run_passes(problem, 0.4)
    said = capsys.readouterr().out.splitlines()
    assert sum("RuntimeError: out of order" in each for each in said) == 4
    assert any(each.endswith("TB/s  rows back") for each in said)
    named = [each for each in said if "TFLOP/s" in each or " - " in each]
    assert any("int8_fp8" in each for each in named)
    if problem.device.type == "cuda":
        assert any("an order is 100.00% of it" in each for each in named)


def test_an_order_there_and_back_is_none(problem):
    torch.manual_seed(0)
    call = prepare.order_of_a_call(problem)
    torch.manual_seed(0)
    assert torch.equal(call(), problem.tensors()[0])


def test_skipping_is_compared_with_what_leaves_out_nothing(problem, monkeypatch, capsys):
    monkeypatch.setattr(skip, "time_gpu", lambda call: 1.0 if call() else 0.0)
    monkeypatch.setattr(skip, "BACKENDS", ("reference", "none"))
    monkeypatch.setattr(skip, "APART", (0.0, 3.0))
    skip.run_skips(problem, 0.4)
    said = capsys.readouterr().out
    assert said.count("none: ") == 2  # a backend that is not there, for each distance
    found = re.findall(r"([\d.]+)% of the listed blocks left out, .* ([\d.e+-]+)\n", said)
    shares, errors = zip(*((float(share), float(error)) for share, error in found), strict=True)
    assert shares[:2] == (0, 0) and shares[3] >= shares[2] > 0
    assert max(errors[:2]) == 0 and max(errors) < 0.1


def test_time_of_a_kernel_is_its_own(problem):
    calls = {"slow": lambda: time.sleep(0.004), "fast": lambda: None}
    times = measure.time_interleaved(calls, 3)
    assert times["slow"] > 3.9 > times["fast"]
