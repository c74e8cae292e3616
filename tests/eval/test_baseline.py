"""The search for the fastest exact dense attention."""

import pytest
import torch

from tests.tiny_models import WAN_CALL, tiny_wan
from vdit_sparse.eval import baseline
from vdit_sparse.eval.baseline import CANDIDATES, Baseline, find_baseline

INPUTS = {**WAN_CALL, "seed": 0, "height": 64, "width": 64, "num_frames": 5}


def backends(pipe):
    return {str(block.attn1.processor._attention_backend) for block in pipe.transformer.blocks}


def test_a_cpu_has_one_candidate():
    found = find_baseline(tiny_wan(), INPUTS)
    assert (found.backend, found.seconds) == ("native", {})
    assert found.reasons == dict.fromkeys(CANDIDATES[1:], "the device is a CPU")


def test_each_candidate_is_timed_or_has_a_reason(device, monkeypatch):
    pipe = tiny_wan().to(device)
    monkeypatch.setattr(baseline, "execution_device", lambda pipe: torch.device("cuda"))
    found = find_baseline(pipe, INPUTS)
    assert found.backend == min(found.seconds, key=found.seconds.get)
    assert {**found.seconds, **found.reasons}.keys() == set(CANDIDATES)
    assert not set(found.seconds) & set(found.reasons) and all(found.reasons.values())
    assert all(found.backend in name.lower() for name in backends(pipe))


def test_the_fastest_is_left_set(monkeypatch):
    pipe = tiny_wan()
    seconds = iter([9.0, 3.0, 3.0, 9.0, 2.0, 1.0])
    monkeypatch.setattr(baseline, "execution_device", lambda pipe: torch.device("cuda"))
    monkeypatch.setattr(baseline, "CANDIDATES", ("native", "_native_math", "flash"))
    monkeypatch.setattr(baseline, "_seconds", lambda pipe, inputs: next(seconds))
    real = baseline.set_backend

    def set_backend(pipe, name):
        if name == "flash":
            raise RuntimeError("no\nflash here")
        real(pipe, name)

    monkeypatch.setattr(baseline, "set_backend", set_backend)
    found = find_baseline(pipe, INPUTS)
    reasons = {"flash": "no flash here"}
    assert found == Baseline("_native_math", {"native": 3.0, "_native_math": 1.0}, reasons)
    assert all("_native_math" in name.lower() for name in backends(pipe))


def test_no_dense_attention_is_an_error(monkeypatch):
    monkeypatch.setattr(baseline, "execution_device", lambda pipe: torch.device("cuda"))
    monkeypatch.setattr(baseline, "CANDIDATES", ("no_such_backend",))
    with pytest.raises(RuntimeError, match="No dense attention runs .*no_such_backend"):
        find_baseline(tiny_wan(), INPUTS)
