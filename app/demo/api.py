"""The studio for programs: what `gradio_client` can call. docs/demo.md has an example."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import gradio as gr
from gradio.processing_utils import save_file_to_cache

from vdit_sparse.app.demo.desk import Desk
from vdit_sparse.app.demo.routes import owner_in
from vdit_sparse.app.demo.store import owner_of
from vdit_sparse.app.demo.worker import CANCELLED, FAILED, FINISHED, Job, in_words
from vdit_sparse.app.options import InputError

# Seconds between two answers about a run that goes on.
EVERY = 0.3


def add_api(desk: Desk) -> None:
    """Adds the endpoints /generate and /methods to the page that is being built."""
    hidden = {"visible": False}
    prompt, runs, settings = gr.Textbox(**hidden), gr.JSON(**hidden), gr.JSON(**hidden)
    image, calibration = gr.File(**hidden), gr.File(**hidden)
    card, files = gr.JSON(**hidden), gr.File(file_count="multiple", **hidden)

    async def generate(
        prompt: str,
        runs: list,
        settings: dict | None = None,
        image: str | None = None,
        calibration: str | None = None,
        request: gr.Request = None,
    ):
        """One run, or dense attention and others on the same noise."""
        owner = owner_in(request) or owner_of(f"session {request.session_hash}")
        form = {"prompt": prompt, "runs": runs}
        uploads = {"image": image, "calibration": calibration}
        try:
            job = await asyncio.to_thread(_submitted, desk, owner, form, settings, uploads)
        except InputError as error:
            raise gr.Error(in_words(error), print_exception=False) from error
        async for shown in _followed(desk, job):
            yield shown, None
        if job.state != FINISHED:
            raise gr.Error(job.error or f"The run was {job.doing}.", print_exception=False)
        found = desk.store.card(owner, job.name)
        yield found, await asyncio.to_thread(_copies, desk, job, found["files"])

    gr.Button(visible=False).click(
        generate,
        [prompt, runs, settings, image, calibration],
        [card, files],
        api_name="generate",
        # The worker has a queue of its own.
        concurrency_limit=None,
    )
    gr.api(desk.forms, api_name="methods", queue=False)


def _submitted(
    desk: Desk, owner: str, form: dict, settings: object, uploads: dict[str, str | None]
) -> Job:
    """The job of a call, after its files were judged and kept. Raises InputError."""
    if not isinstance(settings, dict | None):
        raise InputError('The settings must be an object such as {"seed": 3}.')
    form = {**(settings or {}), **form}
    for name, keep in (("image", desk.upload_image), ("calibration", desk.upload_calibration)):
        if uploads[name] is not None:
            form[name] = keep(owner, Path(uploads[name]))[0]
    runs = form["runs"]
    kind = "generate" if isinstance(runs, list) and len(runs) == 1 else "compare"
    return desk.submit(owner, kind, form)


async def _followed(desk: Desk, job: Job) -> AsyncIterator[dict]:
    """How far a job is, until it is at its end. A client that leaves asks no more, so that the job
    ends too."""
    while job.state not in (FINISHED, CANCELLED, FAILED):
        shown = desk.status(job.owner, job.name)
        yield {name: shown[name] for name in ("state", "before", "doing", "done", "total")}
        await asyncio.sleep(EVERY)


def _copies(desk: Desk, job: Job, names: list[str]) -> list[str]:
    """The files of a run where Gradio may serve them, under names that nobody guesses."""
    folder = desk.store.folder(job.owner, job.name)
    home = gr.utils.get_upload_folder()
    return [save_file_to_cache(folder / name, home) for name in names]
