"""SIGTERM ends a stage early: what was trained is saved and exported, the rest is left out."""

import os
import signal
import threading
import time

import pytest
import torch

from tests.pipelines.mini.toys import randomise
from vdit_sparse.pipelines.mini.training import train
from vdit_sparse.pipelines.mini.training.checkpoints import Checkpoints
from vdit_sparse.pipelines.mini.training.clips import ClipShape, Limit, render_bytes
from vdit_sparse.pipelines.mini.training.models import TINY, build_autoencoder
from vdit_sparse.pipelines.mini.training.pacing import Pace, stopped_by_signal, stopping


@pytest.fixture
def untrained(tmp_path):
    torch.manual_seed(0)
    checkpoints, vae = Checkpoints(tmp_path), randomise(build_autoencoder(TINY), 0.05)
    state = {"average": vae.state_dict(), "mean": torch.zeros(8), "std": torch.ones(8)}
    checkpoints.save("autoencoder", state)
    return checkpoints


def test_a_stopped_stage_is_saved_and_exported_and_nothing_else_begins(untrained, capsys):
    common = ["--folder", str(untrained.folder), "--sizes", "tiny", "--device", "cpu"]
    size = ["--height", "32", "--width", "64", "--frames", "5"]
    stage = ["denoiser", *common, *size, "--stages", "32x64 clips=4 / 48x64 clips=4"]
    stage += ["--batch", "2", "--long-clips", "0", "--seconds", "60", "--no-compiled"]
    threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    start = time.perf_counter()
    train.main([*stage, "then", "sample", *common, *size, "then", "export", *common])
    assert time.perf_counter() - start < 30
    assert untrained.load("denoiser")["step"] >= 1
    assert (untrained.pipeline / "model_index.json").is_file()
    said = capsys.readouterr().out
    assert "stage sample left out: told to stop" in said
    assert "stage ClipShape(height=48" not in said


def test_the_handler_is_there_only_within():
    before = signal.getsignal(signal.SIGTERM)
    with stopped_by_signal():
        assert Pace(60).fraction() < 1
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping() and Pace(60).fraction() == 1
        # One batch comes however short the time.
        clips = render_bytes(ClipShape(32, 64, 5, "cpu"), Limit(2), 0)
        assert len(clips) == 2
    assert not stopping() and signal.getsignal(signal.SIGTERM) == before
