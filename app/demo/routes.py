"""The addresses that the page's own elements read: forms, jobs, finished runs and their files."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from vdit_sparse.app.demo.desk import Desk
from vdit_sparse.app.demo.gate import secret_of
from vdit_sparse.app.demo.store import owner_of
from vdit_sparse.app.options import InputError

STATIC = Path(__file__).parent / "static"
MISSING = "There is nothing of this name among your runs."


def owner_in(request) -> str | None:
    """The key of the user whose cookie came with a request."""
    secret = secret_of(request.headers.get("cookie", ""))
    return None if secret is None else owner_of(secret)


def routes(desk: Desk) -> list:
    """Everything below /studio."""
    pages = Pages(desk)
    return [
        Mount("/studio/static", StaticFiles(directory=STATIC)),
        Route("/studio/forms", pages.forms),
        Route("/studio/model", pages.model),
        Route("/studio/jobs", pages.jobs),
        Route("/studio/jobs/{name}", pages.job),
        Route("/studio/jobs/{name}/cancel", pages.cancel, methods=["POST"]),
        Route("/studio/runs", pages.runs),
        Route("/studio/runs/{name}", pages.run),
        Route("/studio/runs/{name}/delete", pages.delete, methods=["POST"]),
        Route("/studio/files/{name}/{file}", pages.file),
    ]


class Pages:
    """The answers. Functions without `async` run in threads, so that reading a disk holds nobody
    up."""

    def __init__(self, desk: Desk):
        self.desk = desk

    def forms(self, request: Request) -> Response:
        return JSONResponse(self.desk.forms())

    def model(self, request: Request) -> Response:
        try:
            return JSONResponse(self.desk.about(request.query_params.get("name", "")))
        except InputError as error:
            return JSONResponse({"error": str(error)}, 404)

    def jobs(self, request: Request) -> Response:
        owner = owner_in(request)
        current = self.desk.worker.current(owner) if owner else []
        return JSONResponse([self.desk.shown(job) for job in current])

    def job(self, request: Request) -> Response:
        owner, name = owner_in(request), request.path_params["name"]
        return _found(owner and self.desk.status(owner, name))

    def cancel(self, request: Request) -> Response:
        owner, name = owner_in(request), request.path_params["name"]
        return _found({} if owner and self.desk.cancel(owner, name) else None)

    def runs(self, request: Request) -> Response:
        owner = owner_in(request)
        return JSONResponse(self.desk.gallery(owner) if owner else [])

    def run(self, request: Request) -> Response:
        owner, name = owner_in(request), request.path_params["name"]
        return _found(owner and self.desk.store.card(owner, name))

    def delete(self, request: Request) -> Response:
        owner, name = owner_in(request), request.path_params["name"]
        if owner and self.desk.store.card(owner, name) is not None:
            self.desk.store.remove(owner, name)
            return JSONResponse({})
        return _found(None)

    def file(self, request: Request) -> Response:
        owner, path = owner_in(request), request.path_params
        file = self.desk.store.file(owner, path["name"], path["file"]) if owner else None
        if file is None:
            return _found(None)
        keep = {"cache-control": "private, max-age=31536000, immutable"}
        return FileResponse(file, headers=keep)


def _found(content: dict | None) -> Response:
    if content is None or content == "":
        return JSONResponse({"error": MISSING}, 404)
    return JSONResponse(content)
