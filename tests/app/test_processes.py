"""`vdit-sparse generate` under torchrun."""

import json
import subprocess
import sys

import imageio.v3 as iio
import pytest
import torch
import torch.distributed as dist

from vdit_sparse.app.options import InputError, parse_run
from vdit_sparse.app.processes import joined
from vdit_sparse.app.request import Request

WORDS = ["--prompt", "a cat runs", "--negative-prompt", "bad", "--device", "cpu"]
SMALL = ["--size", "128x128", "--num-frames", "17", "--steps", "3", "--dtype", "fp32"]
METHOD = ["--method", "adaspa", "--set", "dense_steps=1", "--compare", "dense"]


def request(tmp_path, **fields) -> Request:
    return Request(prompt="a cat", runs=(parse_run("dense"),), out=tmp_path, **fields)


def test_alone_a_request_stays_as_it_is(tmp_path):
    asked = request(tmp_path)
    with joined(asked) as (own, shows):
        assert own is asked and shows
        assert not dist.is_initialized()


@pytest.mark.parametrize("kind", ["guidance", "both"])
def test_alone_nothing_can_be_shared(tmp_path, kind):
    with pytest.raises(InputError, match="run `torchrun"), joined(request(tmp_path, parallel=kind)):
        pass


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"offload": "model"}, "--offload model does not go"), ({"device": "cuda:1"}, "one device")],
)
def test_what_several_processes_cannot_do(tmp_path, monkeypatch, fields, said):
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    with pytest.raises(InputError, match=said), joined(request(tmp_path, **fields)):
        pass


def test_an_unknown_way_to_share_is_one_line(cli, tmp_path):
    result = cli("generate", *WORDS, "--parallel", "rings", "--out", tmp_path)
    assert result.exit_code == 2
    assert "--parallel must be one of tokens, guidance, both" in result.output


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("tokens", 2), ("guidance", 2), ("both", 4)])
def test_processes_make_the_video_of_one(cli, tiny_model, tmp_path, kind, count):
    words = [*WORDS, *SMALL, *METHOD, "--model", str(tiny_model)]
    alone = cli("generate", *words, "--out", tmp_path / "alone")
    assert alone.exit_code == 0, alone.output
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    words += ["--parallel", kind, "--out", str(tmp_path / "together")]
    together = subprocess.run(
        [*torchrun, "-m", "vdit_sparse.app.cli", "generate", *words],
        capture_output=True,
        text=True,
    )
    assert together.returncode == 0, together.stderr
    assert together.stdout.count("adaspa.mp4") == 1  # one process tells
    report = json.loads((tmp_path / "together" / "report.json").read_text())
    assert report["settings"]["processes"] == count and report["settings"]["parallel"] == kind
    for name in ("dense.mp4", "adaspa.mp4"):
        one, other = (iio.imread(tmp_path / folder / name) for folder in ("alone", "together"))
        apart = torch.from_numpy(one).float() - torch.from_numpy(other).float()
        assert apart.abs().max() <= 1, name
