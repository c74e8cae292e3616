"""Evaluations that are killed, continued, sharded, and that meet errors."""

import errno
import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.eval import run_cases
from tests.eval.run_cases import PROTOCOL, SEEDS, SUITE, TRIALS, all_samples, evaluation
from vdit_sparse.eval.run import Stopped, Trial, shard
from vdit_sparse.eval.store import Made, Store, StoreError, differences, digest, read_rows

ROOT = Path(__file__).parents[2]
TOTAL = len(SUITE.prompts) * len(SEEDS) * len(TRIALS)


def run(folder, samples=None, **changes):
    """A whole evaluation, and its store closed as the end of a process would."""
    running = evaluation(folder, **changes)
    try:
        for sample in samples if samples is not None else all_samples():
            running.do(sample)
    finally:
        running.store.close()
    return running


def timeless(folder):
    rows = read_rows(folder)
    return {row["key"]: {k: v for k, v in row.items() if k != "written"} for row in rows}


def files(folder, kind):
    return sorted(str(file.relative_to(folder)) for file in (folder / kind).rglob("*.*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an evaluation that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


def test_a_row_and_a_video_a_sample(whole):
    rows = read_rows(whole)
    assert len(rows) == TOTAL == len({row["file"] for row in rows})
    for row in rows:
        assert (whole / row["file"]).stat().st_size == torch.Size(run_cases.SHAPE).numel()
        dense = row["method"]["name"] == "dense"
        assert row["speedup"] is None if dense else row["speedup"] == 2.0
        assert ("psnr" in row["metrics"]) != dense
    of_cats = [row["file"] for row in rows if row["prompt"] == "a cat" and row["seed"] == 1]
    assert "videos/dense/a cat-1.mp4" in of_cats
    assert "videos/radial-decay=0.5/a cat-1.mp4" in of_cats
    assert files(whole, "frames") == []


def test_killed_twenty_times_it_loses_the_sample_in_hand_and_repeats_none(whole, tmp_path):
    command = [sys.executable, "-m", "tests.eval.run_cases", str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen(command, **pipes) as process:

        def round_of(limit):
            process.stdin.write(f"{limit}\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        rows = 0
        # Opening the folder is seven changes, a sample about eight: every change is hit.
        for kill in range(20):
            assert round_of(5 + kill) == signal.SIGKILL
            now = len(read_rows(tmp_path))
            assert rows <= now < TOTAL
            rows = now
        assert rows > 5
        assert round_of(0) == 0
        process.stdin.close()
    made = Counter((tmp_path / "made.log").read_text().splitlines())
    assert len(made) == TOTAL and made.total() - TOTAL <= 20
    assert timeless(tmp_path) == timeless(whole)
    assert files(tmp_path, "videos") == files(whole, "videos")
    assert files(tmp_path, "frames") == []


def test_kept_frames_are_measured_without_another_run(tmp_path, whole):
    def breaks(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, measure=breaks)
    assert read_rows(tmp_path) == [] and len(files(tmp_path, "frames")) == 1
    made = []

    def counted(*arguments):
        made.append(arguments)
        return run_cases.make(*arguments)

    run(tmp_path, make=counted)
    assert len(made) == TOTAL - 1 and timeless(tmp_path) == timeless(whole)


def test_a_method_that_comes_later_needs_the_dense_frames_only(tmp_path, whole):
    run(tmp_path, trials=TRIALS[:2])
    made = []

    def counted(prompt, seed, trial):
        made.append(trial.name)
        return run_cases.make(prompt, seed, trial)

    run(tmp_path, make=counted)
    third = TOTAL // 3
    assert Counter(made) == {"dense": third, "draft": third}
    assert timeless(tmp_path) == timeless(whole)


def test_shards_make_everything_once(tmp_path, whole):
    for index in range(3):
        run(tmp_path, shard(all_samples(), index, 3), worker=f"shard-{index}")
    assert sum(len(shard(all_samples(), index, 3)) for index in range(3)) == len(all_samples())
    lines = [line for file in (tmp_path / "rows").iterdir() for line in file.open()]
    assert len(lines) == TOTAL and set(timeless(tmp_path)) == set(timeless(whole))


def test_two_processes_cannot_write_as_one_worker(tmp_path):
    first = Store(tmp_path)
    with pytest.raises(StoreError, match="Another process is writing .* --shard"):
        Store(tmp_path)
    first.close()
    Store(tmp_path).close()


def test_frames_stay_if_asked_and_without_loss(tmp_path):
    running = run(tmp_path, keep_frames=True)
    assert len(files(tmp_path, "frames")) == TOTAL
    sample = all_samples()[0]
    found = running.store.kept(running.key(sample, TRIALS[1]))
    expected = run_cases.make(sample.prompt, sample.seed, TRIALS[1])
    assert torch.equal(found.frames, expected.frames) and found.facts == expected.facts
    assert torch.equal(found.latents, expected.latents)


def test_frames_that_the_disk_lost_are_made_again(tmp_path):
    store = Store(tmp_path)
    store.keep("x", Made(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), {}))
    assert store.kept("x").latents is None
    file = tmp_path / "frames" / "x.npz"
    for content in (file.read_bytes()[:-30], file.read_bytes()[:100], b""):
        file.write_bytes(content)
        assert store.kept("x") is None
    store.close()


def test_a_key_is_of_all_settings(tmp_path):
    running = evaluation(tmp_path)
    sample, *_, other = all_samples()
    keys = [running.key(sample, trial) for trial in TRIALS] + [running.key(other, TRIALS[0])]
    keys.append(running.key(sample, Trial("radial", "x", object(), settings={"decay": 0.6})))
    keys.append(evaluation(tmp_path / "other").key(sample, TRIALS[0]))
    assert len(set(keys)) == len(keys) - 1 and keys[-1] == keys[0]
    changed = {**PROTOCOL, "settings": {"steps": 4}}
    assert digest(changed) != digest(PROTOCOL)
    assert differences(PROTOCOL, changed) == ["settings.steps: 3 and 4"]


def test_a_folder_keeps_its_protocol(tmp_path):
    store = Store(tmp_path)
    told = {**PROTOCOL, "baseline": {"backend": "native", "seconds": {"native": 1.0}}}
    assert store.agree(told) == told
    again = {**told, "baseline": {"backend": "native", "seconds": {"native": 2.0}}}
    assert store.agree(again) == told
    with pytest.raises(StoreError, match=r"other settings \(settings.steps: 3 and 4; metrics:"):
        store.agree({**told, "settings": {"steps": 4}, "metrics": ["psnr", "ssim"]})
    store.close()


def test_a_failure_costs_its_sample(tmp_path, whole):
    def fails(prompt, seed, trial):
        if (prompt.text, seed, trial.name) == ("a cat", 0, "radial"):
            raise RuntimeError("out of\nmemory")
        if (prompt.text, seed, trial.name) == ("A cat", 0, "dense"):
            raise OSError("the image is broken")
        return run_cases.make(prompt, seed, trial)

    said = []
    running = run(tmp_path, make=fails, tell=lambda *about: said.append(about[2]))
    assert running.failed == 2 and len(read_rows(tmp_path)) == TOTAL - 1 - len(TRIALS)
    failures = read_rows(tmp_path, "failures")
    assert [row["error"] for row in failures] == [
        "RuntimeError: out of memory",
        "OSError: the image is broken",
    ]
    assert failures[0]["method"] == "radial decay=0.5" and set(said) > {"made", "row"}
    run(tmp_path)
    assert timeless(tmp_path) == timeless(whole)


def test_a_full_disk_stops_and_loses_nothing(tmp_path, whole):
    def full(path, frames):
        if path.parent.name == "draft":
            raise OSError(errno.ENOSPC, "No space left on device")
        run_cases.write(path, frames)

    with pytest.raises(Stopped, match="No space left on device.: make room"):
        run(tmp_path, write=full)
    assert len(read_rows(tmp_path)) == 2
    run(tmp_path)
    assert timeless(tmp_path) == timeless(whole)


def test_a_full_disk_that_ffmpeg_hides_is_seen_too(tmp_path, monkeypatch):
    def broken(path, frames):
        raise OSError("ffmpeg wrote 1 of 2 frames")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(Stopped, match="No space left on device"):
            run(tmp_path, write=broken)
    assert read_rows(tmp_path) == [] == read_rows(tmp_path, "failures")


def test_a_row_that_could_not_be_written_is_not_there(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.append({"key": "a"})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(OSError):
            store.append({"key": "b"})
    store.append({"key": "c"})
    assert [row["key"] for row in read_rows(tmp_path)] == ["a", "c"]
    store.close()


def test_five_failures_in_a_row_stop(tmp_path):
    def fails(prompt, seed, trial):
        if trial.name != "dense":
            raise ValueError("no kernel")
        return run_cases.make(prompt, seed, trial)

    trials = (TRIALS[0], *(Trial("radial", f"r{n}", object(), settings={"n": n}) for n in range(9)))
    with pytest.raises(Stopped, match="5 samples in a row failed, the last with ValueError: no"):
        run(tmp_path, make=fails, trials=trials)
    assert len(read_rows(tmp_path)) == 1


def test_an_unfinished_line_does_not_count_and_a_broken_one_is_named(tmp_path):
    store = Store(tmp_path)
    store.append({"key": "a"})
    store.close()
    file = tmp_path / "rows" / "main.jsonl"
    with file.open("a") as out:
        out.write('{"key": "b", "psn')
    assert [row["key"] for row in read_rows(tmp_path)] == ["a"]
    store = Store(tmp_path)
    store.append({"key": "c"})
    store.close()
    assert [json.loads(line)["key"] for line in file.open()] == ["a", "c"]
    file.write_text('{"key": "a"}\nxx\n')
    with pytest.raises(StoreError, match="main.jsonl, line 2: this is no row"):
        read_rows(tmp_path)


def test_dense_comes_first(tmp_path):
    with pytest.raises(ValueError, match="dense as the first trial"):
        evaluation(tmp_path, trials=TRIALS[::-1])
