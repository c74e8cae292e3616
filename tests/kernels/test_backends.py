"""The choice of a backend: an explicit one runs or says why not, the default is for the device."""

import sys
from types import SimpleNamespace

import pytest
import torch

from vdit_sparse.kernels import backends

X = torch.zeros(1)
NAMES = {"triton": "made_up_triton", "portable": "made_up_portable", "absent": "made_up_absent"}


@pytest.fixture
def modules(monkeypatch):
    """A Triton that takes even numbers, and a portable backend that takes all but 13."""
    made = {
        "made_up_triton": lambda x, n: "odd" if n % 2 else None,
        "made_up_portable": lambda x, n: "unlucky" if n == 13 else None,
    }
    for name, supports in made.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(name=name, supports=supports))


def test_a_named_backend_runs(modules):
    assert backends.choose(NAMES, "triton", X, 2).name == "made_up_triton"
    assert backends.choose(NAMES, "portable", X, 2).name == "made_up_portable"


def test_a_named_backend_says_why_not(modules):
    with pytest.raises(ValueError, match="'triton' does not take this call: odd. Leave `backend`"):
        backends.choose(NAMES, "triton", X, 3)
    with pytest.raises(ValueError, match="'absent' does not take this call: cannot be imported"):
        backends.choose(NAMES, "absent", X, 2)
    with pytest.raises(ValueError, match="unlucky. See the list."):
        backends.load(NAMES, "portable", X, 13, advice="See the list.")


def test_unknown_names_are_refused(modules):
    with pytest.raises(ValueError, match=r"\('triton', 'portable', 'absent'\) or None, got 'cuda'"):
        backends.choose(NAMES, "cuda", X, 2)


@pytest.mark.parametrize(("device", "n"), [("cpu", 2), ("mps", 2), ("cuda", 3)])
def test_the_default_is_the_portable_one(device, n, modules):
    x = SimpleNamespace(device=torch.device(device))
    assert backends.choose(NAMES, None, x, n).name == "made_up_portable"


def test_the_default_on_a_gpu_is_triton_if_it_takes_the_call(modules):
    x = SimpleNamespace(device=torch.device("cuda"))
    assert backends.default(NAMES, x, 2) == "triton"
    assert backends.default({"triton": "made_up_absent", "portable": "any"}, x, 2) == "portable"


def test_a_default_that_does_not_take_the_call_is_no_fallback(modules):
    with pytest.raises(ValueError, match="'portable' does not take this call: unlucky"):
        backends.choose(NAMES, None, X, 13)


def test_why_not(modules):
    assert backends.why_not(NAMES, "triton", X, 2) is None
    assert backends.why_not(NAMES, "triton", X, 1) == "odd"
    assert backends.why_not(NAMES, "absent", X, 1).startswith("cannot be imported: No module")
