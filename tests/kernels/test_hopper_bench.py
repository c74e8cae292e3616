"""The study of the Hopper kernel's forms: one that fails, hangs or dies is a line, not the end."""

import os
import time

from vdit_sparse.kernels.bench_hopper import Form, each, facts, forms, line, rates, with_dense

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


def test_every_form_has_a_line():
    every = forms(GROUPS)
    assert len(set(every)) == len(every) and {form.group for form in every} == set(GROUPS)
    for form in every:
        assert form.blocks[0] << form.variant.paired == form.variant.rows
        assert form.blocks[1] % form.variant.keys == 0
        place = {"pattern": "local", "density": 0.25}
        row = (
            facts(form) | place | rates({"heads": 24, "tokens": 32768, "dim": 128}, 0.25, {"ms": 5})
        )
        assert "TFLOP/s" in line(row) and form.name in line(facts(form) | {"note": "hung"})
    dense = [form for form in with_dense(every) if form.group == "dense"]
    assert dense == [Form("dense", "cuDNN", dim) for dim in (128, 128, 64, 64)]
