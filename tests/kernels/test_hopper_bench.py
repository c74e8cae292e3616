"""The study of the Hopper kernel's forms: one that fails, hangs or dies is a line, not the end."""

import os
import time
from collections import deque

from vdit_sparse.kernels import bench_hopper
from vdit_sparse.kernels.bench.lanes import each
from vdit_sparse.kernels.bench_hopper import Form, facts, forms, line, rates, with_dense

GROUPS = ["wide", "narrow", "rows", "eight"]


def work(job: str) -> str:
    if job == "fails":
        raise ValueError("no such instruction")
    if job == "dies":
        os._exit(3)
    if job == "hangs":
        time.sleep(600)
    return job.upper()


def test_what_goes_wrong_stays_with_its_job():
    # The first process of all imports torch.
    assert list(each(["a"], work, 1, 120)) == [("a", "A", None)]
    jobs = ["a", "fails", "b", "dies", "hangs", "c"]
    found = {job: (result, fault) for job, result, fault in each(jobs, work, 2, 6)}
    assert [found[job] for job in "abc"] == [("A", None), ("B", None), ("C", None)]
    assert found["fails"] == (None, "ValueError: no such instruction")
    assert found["dies"] == (None, "its process died: exit code 3")
    assert found["hangs"] == (None, "hung: no result in 6 s")


def test_every_form_has_a_line(monkeypatch):
    every = forms(GROUPS)
    assert len(set(every)) == len(every) and {form.group for form in every} == set(GROUPS)
    for form in every:
        assert form.blocks[0] == form.variant.rows
        assert form.blocks[1] % form.variant.keys == 0
        place = {"pattern": "local", "density": 0.25}
        row = (
            facts(form) | place | rates({"heads": 24, "tokens": 32768, "dim": 128}, 0.25, {"ms": 5})
        )
        assert "TFLOP/s" in line(row) and form.name in line(facts(form) | {"note": "hung"})
    for there in (None, "spec"):
        monkeypatch.setattr(bench_hopper, "find_spec", lambda name, found=there: found)
        dense = [form for form in with_dense(every) if form.group == "dense"]
        names = ["cuDNN", "FA3"][: 1 if there is None else 2]
        assert dense == [Form("dense", name, dim) for dim in (128, 64) for name in names]


def test_forms_are_timed_in_rounds(monkeypatch, capsys):
    """In other orders; one that fails is left out of the later rounds, and its times stay."""
    slow, fails = forms(["wide"])[:2]
    monkeypatch.setattr(bench_hopper, "ROUNDS", 5)
    seen, times = [], iter([5.5, 5.0, 9.0, 6.0, 6.0])

    def run(jobs, work, lanes, seconds):
        assert isinstance(jobs, deque)
        while jobs:
            count, form = job = jobs.popleft()
            seen.append(job)
            if form == fails:
                yield job, None, "hung"
                continue
            place = {"pattern": "all", "density": 1.0, "ms": next(times) if form == slow else 1.0}
            yield job, [facts(form) | place | {"tflops": 1.0}], None

    monkeypatch.setattr(bench_hopper, "each", run)
    monkeypatch.setattr(bench_hopper, "find_spec", lambda name: None)
    table, failed = bench_hopper.time_all([slow, fails], {})
    dense = Form("dense", "cuDNN", 128)
    orders = [[form for count, form in seen if count == number] for number in range(5)]
    assert set(orders[0]) == {slow, fails, dense} and sum(map(len, orders)) == 11
    assert {tuple(found) for found in orders[1:]} == {(slow, dense), (dense, slow)}
    assert failed == 1 and table[0]["note"] == "hung, timed" and len(table) == 3
    assert table[1]["ms"] == 6.0 and abs(table[1]["spread"] - 0.8) < 1e-9
    assert table[1]["tflops"] == rates(bench_hopper.WIDE, 1.0, {"ms": 6.0})["tflops"]
    assert "+80 %" in line(table[1]) and capsys.readouterr().out.count("\n") == 11
