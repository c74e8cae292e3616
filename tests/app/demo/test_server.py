"""The studio over HTTP: its gate, its users, its limits, and its API."""

import base64
import gc
import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError

from tests.app.demo.conftest import FORM, running, until
from vdit_sparse.app.demo import worker
from vdit_sparse.app.demo.desk import EXAMPLES, Desk
from vdit_sparse.app.demo.gate import COOKIE
from vdit_sparse.app.demo.limits import Limits
from vdit_sparse.app.demo.store import new_name, owner_of
from vdit_sparse.app.demo.worker import Busy, Job, Worker
from vdit_sparse.app.options import InputError


def made(desk: Desk, owner: str, form: dict = FORM) -> Job:
    """A finished run of a user."""
    job = desk.submit(owner, "compare", form)
    until(lambda: job.state not in ("waiting", "running"))
    assert job.state == "finished", job.error
    return job


def owner(client: httpx.Client) -> str:
    return owner_of(client.cookies[COOKIE])


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "/studio/static/../limits.py",
        "/studio/static/%2e%2e/limits.py",
        "/studio/static/..%2flimits.py",
        "/studio/files/%2e%2e/%2e%2e/etc/passwd",
        "/studio/files/..%2f..%2f/studio.json",
        "/studio/files/{name}/..%2fstudio.json",
        "/studio/files/{name}/%2e%2e",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=pyproject.toml",
        "/gradio_api/file={state}/users/{owner}/{name}/report.json",
    ],
)
def test_no_path_leads_elsewhere(path, served, user):
    address, desk = served
    if not hasattr(desk, "finished"):
        desk.finished = made(desk, owner(user))
    known = {"name": desk.finished.name, "owner": desk.finished.owner}
    answer = user.get(path.format(**known, state=desk.store.root))
    assert answer.status_code in (403, 404), answer.text[:200]
    assert "root:" not in answer.text and "hatchling" not in answer.text


def test_a_run_belongs_to_one_user(served, user):
    address, desk = served
    job = made(desk, owner(user), {**FORM, "runs": ["dense", "radial:block=64"]})
    own = [f"/studio/{what}/{job.name}" for what in ("jobs", "runs")]
    own.append(f"/studio/files/{job.name}/dense.mp4")
    for path in own:
        assert user.get(path).status_code == 200
    card = user.get(own[1]).json()
    assert [run["name"] for run in card["runs"]] == ["dense", "radial"]
    assert card["runs"][1]["psnr"] > 10 and card["runs"][1]["vmaf"] is not None
    assert "vdit-sparse generate" in card["command"] and "load_pipeline" in card["script"]
    for name in card["files"]:
        assert len(user.get(f"/studio/files/{job.name}/{name}").content) > 20
    assert user.get(own[2], headers={"range": "bytes=0-9"}).status_code == 206
    with httpx.Client(base_url=address) as other:
        for path in own:
            assert other.get(path).status_code == 404
        assert other.post(f"/studio/runs/{job.name}/delete").status_code == 404
        assert other.post(f"/studio/jobs/{job.name}/cancel").status_code == 404
        assert other.get("/studio/runs").json() == []
    assert [run["name"] for run in user.get("/studio/runs").json()] == [job.name]
    assert user.post(f"/studio/runs/{job.name}/delete").status_code == 200
    assert user.get("/studio/runs").json() == [] and user.get(own[2]).status_code == 404


def test_the_page_asks_nobody_else(served, user):
    page = user.get("/")
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy
    for name in ("studio.js", "studio.css", "elements.css", "player.js"):
        text = user.get(f"/studio/static/{name}").text
        assert len(text) > 500 and "http://" not in text and "https://" not in text


def test_the_prompt_is_there_whatever_of_the_page_comes_late(user):
    """The page's scripts once filled it, and found no field where that came after them."""
    parts = user.get("/config").json()["components"]
    prompt = next(part["props"] for part in parts if part["props"].get("elem_id") == "prompt")
    assert prompt["value"] == EXAMPLES[0]


def test_the_gate(studio):
    locked = replace(studio, auth=("ann", "s3cret:x"))
    right = "Basic " + base64.b64encode(b"ann:s3cret:x").decode()
    wrong = "Basic " + base64.b64encode(b"ann:secret").decode()
    with running(locked) as (address, _):
        paths = ("/", "/studio/forms", "/studio/static/studio.js", "/gradio_api/info", "/config")
        for path in paths:
            for given in ({}, {"authorization": wrong}, {"authorization": "Basic ä".encode()}):
                answer = httpx.get(address + path, headers=given)
                assert answer.status_code == 401 and "Basic" in answer.headers["www-authenticate"]
            assert httpx.get(address + path, headers={"authorization": right}).status_code == 200
        # A page of another name whose address was changed to this machine's.
        headers = {"authorization": right, "host": "evil.example:7860"}
        assert httpx.get(f"{address}/studio/forms", headers=headers).status_code == 403


def test_a_studio_for_others_answers_to_any_name(studio):
    with running(studio, host="0.0.0.0") as (address, _):
        assert httpx.get(f"{address}/studio/forms", headers={"host": "lab:7860"}).status_code == 200


def test_too_much_is_refused(studio):
    small = replace(studio, limits=replace(Limits(), body=10_000))
    with running(small) as (address, _):
        upload = {"files": ("a.png", b"0" * 20_000)}
        assert httpx.post(f"{address}/gradio_api/upload", files=upload).status_code == 413
        unknown = (b"0" * 1000 for _ in range(20))
        answer = httpx.post(f"{address}/gradio_api/upload", content=unknown)
        assert answer.status_code in (400, 413)


def test_the_api(served):
    client = Client(served[0], verbose=False)
    seen = client.submit(
        "a cat runs", ["dense", "radial:block=64"], {"model": "tiny"}, api_name="/generate"
    )
    card, files = seen.result(timeout=120)
    assert [run["density"] for run in card["runs"]][0] == 1.0
    assert {"dense.mp4", "radial.mp4", "report.json"} <= {file.split("/")[-1] for file in files}
    (report,) = (Path(file) for file in files if file.endswith("report.json"))
    report = json.loads(report.read_text())
    assert report["status"] == "finished"
    assert {one["name"] for one in client.predict(api_name="/methods")["methods"]} >= {"radial"}
    with pytest.raises(AppError, match="did you mean 'radial'"):
        client.predict("a cat", ["radiall"], {"model": "tiny"}, api_name="/generate")


def test_fifty_requests_and_then_the_queue_is_empty(studio):
    busy = replace(studio, limits=replace(Limits(), waiting=5, each=50))
    with running(busy) as (address, desk):
        client = Client(address, verbose=False)
        settings = {"model": "tiny", "steps": 1}
        jobs = [
            client.submit(f"cat {number}", ["dense"], settings, api_name="/generate")
            for number in range(50)
        ]
        assert httpx.get(f"{address}/studio/forms", timeout=60).status_code == 200
        failed = [error for job in jobs if (error := job.exception(timeout=120)) is not None]
        assert 1 <= len(failed) <= 45
        assert all("runs are waiting already" in str(error) for error in failed)
        states = {job.state for job in desk.worker.jobs.values()}
        assert states == {"finished"} and len(desk.worker.jobs) == 50 - len(failed)


def test_one_user_does_not_fill_the_queue():
    release = threading.Event()
    queue = Worker(replace(Limits(), waiting=20, each=2), lambda job, state: None)
    jobs = [
        Job("a" * 32, new_name(), "generate", "", lambda job: release.wait(30) and {})
        for _ in range(5)
    ]
    queue.submit(jobs[0])
    until(lambda: jobs[0].state == "running")
    queue.submit(jobs[1]), queue.submit(jobs[2])
    with pytest.raises(Busy, match="2 of your runs are waiting"):
        queue.submit(jobs[3])
    assert queue.place(jobs[2]) == 2
    jobs[4].owner = "b" * 32
    assert queue.submit(jobs[4]) is jobs[4]
    queue.cancel(jobs[1])
    assert jobs[1].state == "cancelled" and queue.place(jobs[2]) == 1
    assert queue.watch(jobs[2].name, "b" * 32) is None
    release.set()
    until(lambda: jobs[4].state == "finished")


def test_cancel_stops_at_the_next_block_and_frees(studio):
    with running(studio) as (_, desk):
        who = "a" * 32
        first = made(desk, who)
        before = tensor_bytes()
        job = desk.submit(who, "generate", {**FORM, "steps": 100})
        until(lambda: job.done >= 2 and job.total == 100)
        assert (
            job.preview["url"].startswith("data:image/png;base64,") and job.preview["frames"] == 3
        )
        assert 0 < job.seconds_left() < 600
        during = tensor_bytes()
        desk.cancel(who, job.name)
        until(lambda: job.state == "cancelled", 5)
        assert job.done < 100 and job.preview is None and job.look is None
        # Of the run nothing is in memory but the scheduler's list of steps.
        assert during > before + 20_000 and tensor_bytes() < before + 2_000
        assert not desk.store.folder(who, job.name).exists()
        assert [card["name"] for card in desk.store.cards(who)] == [first.name]
        pipe = desk.pipelines.load(_request(desk, who))
        assert not any(block._forward_pre_hooks for block in pipe.transformer.blocks)
        again = made(desk, who)
        assert again.state == "finished"


def tensor_bytes() -> int:
    """Of all tensors that anybody holds."""
    gc.collect()
    found = (one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter))
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in found}
    return sum(storages.values())


def _request(desk: Desk, who: str):
    from vdit_sparse.app.demo import ask

    return ask.read(FORM, desk.studio, desk.store.folder(who, new_name()), {})


def test_a_page_that_leaves_ends_its_run(studio):
    patient = replace(studio, limits=replace(Limits(), patience=0.6))
    with running(patient) as (_, desk):
        job = desk.submit("a" * 32, "generate", {**FORM, "steps": 100})
        until(lambda: desk.status("a" * 32, job.name)["total"] == 100)
        until(lambda: job.state == "cancelled", 10)
        assert job.doing == "stopped, because the page was closed"


LEAVES = """
from gradio_client import Client
settings = {"model": "tiny", "steps": 100, "num_frames": 81, "size": "192x192"}
client = Client("ADDRESS", verbose=False)
client.predict("a cat", ["dense"], settings, api_name="/generate")
"""


def test_a_client_that_leaves_ends_its_run(studio):
    patient = replace(studio, limits=replace(Limits(), patience=4.0))
    with running(patient) as (address, desk):
        program = [sys.executable, "-c", LEAVES.replace("ADDRESS", address)]
        with subprocess.Popen(program) as client:
            job = until(lambda: next(iter(desk.worker.jobs.values()), None))
            until(lambda: job.done >= 1 and job.total == 100)
            client.kill()
        until(lambda: job.state in ("cancelled", "finished"), 30)
        assert job.state == "cancelled"


def test_a_failure_is_words_and_the_log_has_the_rest(studio, monkeypatch, caplog):
    def breaks(*_):
        raise RuntimeError(f"no such file: {studio.state}/users/x/y.mp4")

    monkeypatch.setattr("vdit_sparse.app.generate.run", breaks)
    with running(studio) as (_, desk):
        job = desk.submit("a" * 32, "generate", FORM)
        until(lambda: job.state == "failed")
        assert job.error.startswith("The run failed (RuntimeError: no such file: y.mp4)")
        assert "Traceback" not in job.error and str(studio.state) not in job.error
        assert "breaks" in caplog.text and "Traceback" in caplog.text


def test_words_have_no_options():
    assert worker.in_words(InputError("--num-frames must be 5.")) == "Num frames must be 5."
