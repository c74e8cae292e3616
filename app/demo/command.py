"""`vdit-sparse demo`: what its words mean, and the start of the server."""

import importlib.util
from dataclasses import replace
from pathlib import Path

from vdit_sparse.app.checks import check_device
from vdit_sparse.app.demo.limits import Limits, Studio
from vdit_sparse.app.options import InputError


def parse_studio(words: dict) -> Studio:
    """The studio of a command line. Raises InputError for a folder, device or password that cannot
    be."""
    root = words["models"]
    if root is not None and not root.is_dir():
        raise InputError(f"--models {root} is no folder.")
    for model in words["model"] or ():
        if model.startswith((".", "/", "~")) and not Path(model).is_dir():
            raise InputError(f"There is no model folder {model}.")
    check_device(words["device"])
    limits = {name: words[f"max_{name}"] for name in ("pixels", "frames", "steps", "waiting")}
    for name, value in limits.items():
        if value is not None and value < 1:
            raise InputError(f"--max-{name} must be at least 1, got {value}.")
    return Studio(
        state=words["state"],
        models=tuple(words["model"] or ()),
        root=root,
        device=words["device"],
        auth=parse_auth(words["auth"]),
        limits=replace(Limits(), **{name: x for name, x in limits.items() if x is not None}),
    )


def parse_auth(text: str | None) -> tuple[str, str] | None:
    """(user, password) of "user:password", or of the first line of "@file", which `ps` does not
    show."""
    if text is None:
        return None
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text().splitlines()[0].strip()
        except (OSError, IndexError) as error:
            raise InputError(f"--auth {text}: there is no line user:password in it.") from error
    user, colon, password = text.partition(":")
    if not colon or not user or not password:
        raise InputError("--auth must be user:password, or @FILE with such a line.")
    return user, password


def check_gradio() -> None:
    """Raises InputError where the extra is not installed."""
    if importlib.util.find_spec("gradio") is None:
        raise InputError("The studio needs Gradio: run `pip install 'vdit-sparse[demo]'`.")
