"""A running studio that offers a tiny model, and a headless browser where one is installed."""

import json
import shutil
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest

pytest.importorskip("gradio", reason="the studio needs the extra `demo`")

import httpx  # noqa: E402
import uvicorn  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from vdit_sparse.app.cli import app  # noqa: E402
from vdit_sparse.app.demo.limits import Limits, Studio  # noqa: E402
from vdit_sparse.app.demo.server import build_app  # noqa: E402

SMALL = {"height": 32, "width": 64, "num_frames": 9, "num_inference_steps": 2}
STILL = {"height": 32, "width": 48, "num_inference_steps": 2, "max_sequence_length": 16}
# Milliseconds that a browser waits for what comes in the end.
LONG = 60_000
FORM = {"prompt": "a cat runs", "model": "tiny", "runs": ["radial:block=64"]}


@pytest.fixture(scope="session")
def root(tiny_model, tiny_image_model, tiny_flux, tmp_path_factory):
    """A folder of models that are small and fast by default: of videos from text and from an image,
    and of images."""
    folder = tmp_path_factory.mktemp("root")
    for source, text in ((tiny_model, 16), (tiny_image_model, 512)):
        shutil.copytree(source, folder / source.name)
        defaults = {**SMALL, "guidance_scale": 5.0, "max_sequence_length": text, "fps": 8}
        (folder / source.name / "generation.json").write_text(json.dumps(defaults))
    shutil.copytree(tiny_flux, folder / tiny_flux.name)
    (folder / tiny_flux.name / "generation.json").write_text(json.dumps(STILL))
    return folder


@pytest.fixture(scope="session")
def calibration(root, tmp_path_factory):
    """A calibration of the tiny model, of videos of 128x128 pixels and 9 frames."""
    folder = tmp_path_factory.mktemp("calibration")
    (folder / "prompts.txt").write_text("a cat runs\n")
    words = ["calibrate", "--method", "paro", "--prompts", folder / "prompts.txt"]
    words += ["--model", root / "tiny", "--out", folder / "paro.safetensors", "--seeds", 0]
    words += ["--size", "128x128", "--num-frames", 9, "--steps", 2, "--device", "cpu"]
    words += ["--dtype", "fp32", "--set", "density=0.5"]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return folder / "paro.safetensors"


@pytest.fixture
def studio(root, tmp_path):
    """Settings of a studio on the CPU."""
    return Studio(tmp_path / "state", root=root, device="cpu", limits=Limits(patience=60.0))


@contextmanager
def running(studio: Studio, host: str = "127.0.0.1"):
    """(address, desk) of a studio that serves in a thread."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    built = build_app(studio, host)
    server = uvicorn.Server(uvicorn.Config(built, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{port}", built.state.desk
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(10)


@pytest.fixture(scope="session")
def served(root, tmp_path_factory):
    """(address, desk) of one studio for the tests that leave it as it is."""
    state = tmp_path_factory.mktemp("served")
    with running(Studio(state, root=root, device="cpu", limits=replace(Limits(), each=2))) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; skips where Playwright or a Chromium is not installed."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("there is no chromium here")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


# The page is all there: its own elements, and what Gradio fills in when it is opened.
WHOLE = """
  document.querySelector('studio-methods[data-model] studio-method')
  && document.querySelector('studio-stage > *') && document.querySelector('studio-gallery > *')
  && document.querySelector('#size input')?.value
  && document.querySelector('#prompt textarea')?.value
"""


@pytest.fixture
def open_page(browser, served):
    """Opens the page as a new user, or with `context=` as one who was here; what the browser
    complains about, and every address that is not the studio's, fails the test."""
    contexts, wrong = [], []

    def opened(context=None, **options):
        if context is None:
            context = browser.new_context(**{"viewport": {"width": 1300, "height": 900}, **options})
            contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(LONG)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        own = (served[0], "data:", "blob:")
        page.on("request", lambda request: request.url.startswith(own) or wrong.append(request.url))
        page.goto(served[0])
        page.wait_for_function(WHOLE)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not wrong


@pytest.fixture
def user(served):
    """A browser's session with the served studio: its cookie is its own."""
    with httpx.Client(base_url=served[0], timeout=30) as client:
        client.get("/studio/jobs")
        yield client


def until(what, seconds: float = 60.0):
    """What `what()` gives as soon as it is true. Fails after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited {seconds} s in vain")
