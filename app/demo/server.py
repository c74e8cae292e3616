"""The studio as a web server: its addresses and its Gradio page behind one gate."""

import ipaddress
import socket

import gradio as gr
import uvicorn
from fastapi import FastAPI

from vdit_sparse.app.demo.desk import Desk
from vdit_sparse.app.demo.gate import LOOPBACK, Gate
from vdit_sparse.app.demo.limits import Studio
from vdit_sparse.app.demo.page import build_page
from vdit_sparse.app.demo.routes import STATIC, routes
from vdit_sparse.app.demo.theme import studio_theme
from vdit_sparse.app.options import InputError

TITLE = "vdit-sparse studio"
# In this order: the first defines what the others use.
SCRIPTS = (
    "studio.js",
    "methods.js",
    "stage.js",
    "player.js",
    "results.js",
    "gallery.js",
    "bench.js",
    "maps.js",
    "heat.js",
    "inspect.js",
)
SHEETS = ("studio.css", "elements.css")


def build_app(studio: Studio, host: str = "127.0.0.1") -> FastAPI:
    """The whole server as an ASGI application; `app.state.desk` is its desk."""
    desk = Desk(studio)
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.state.desk = desk
    app.router.routes.extend(routes(desk))
    head = "".join(f'<link rel="stylesheet" href="/studio/static/{name}">' for name in SHEETS)
    head += "".join(f'<script defer src="/studio/static/{name}"></script>' for name in SCRIPTS)
    page = build_page(desk)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=studio.limits.body,
        ssr_mode=False,
        enable_monitoring=False,
        favicon_path=str(STATIC / "icon.svg"),
        theme=studio_theme(),
        head=head,
    )
    # A mounted page has not, and of one that has not Gradio takes any file of the server's for an
    # upload whose path a request names.
    page.has_launched = True
    app.add_middleware(Gate, limits=studio.limits, auth=studio.auth, loopback=is_loopback(host))
    return app


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own, out of reach of others."""
    if host in LOOPBACK:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(studio: Studio, host: str, port: int) -> None:
    """Serves until interrupted. Raises InputError if the address or the port cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        # uvicorn would end the process, with its own words.
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise InputError(
            f"Cannot listen on {host}:{port} ({error.strerror}): choose another --port."
        ) from error
    app = build_app(studio, host)
    uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="warning")).run()
