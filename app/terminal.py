"""What every command shows besides its results: errors in one line, warnings, progress bars.

Only the standard library, typer and rich are imported here, as in `cli.py`.
"""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


# (what is going on, how much of it is done, of how much if that is known)
Progress = Callable[[str, int, int | None], None]


@contextmanager
def errors(debug: bool, interrupted: str = "Interrupted.") -> Iterator[None]:
    """Ends in one line on stderr and an exit code, whatever goes wrong; `debug` shows more.

    interrupted: what to say after Ctrl-C.
    """
    try:
        if debug:
            yield
        else:
            with _without_warnings():
                yield
    except KeyboardInterrupt:
        complain(interrupted)
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if isinstance(error, typer.Exit):
            raise
        if debug:
            Console(stderr=True).print_exception()
        bad_input = type(error).__name__ == "InputError"
        expected = bad_input or type(error).__name__ == "RunFailed"
        said = str(error) if expected else f"{type(error).__name__}: {error} (--debug shows where)"
        complain(said)
        raise typer.Exit(BAD_INPUT if bad_input else FAILED) from None


@contextmanager
def _without_warnings() -> Iterator[None]:
    """The libraries' warnings are dropped; ours are one line each."""
    names = ("diffusers", "transformers", "huggingface_hub", "accelerate", "torch")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _show_our_warnings()
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _show_our_warnings() -> None:
    from vdit_sparse.calibration import CalibrationWarning
    from vdit_sparse.pipelines.spot_check import AttentionWarning

    shown = set()

    def show(message, category, *_):
        if str(message) not in shown:
            shown.add(str(message))
            # Progress bars put their own writer in the place of this one.
            sys.stderr.write(f"Warning: {' '.join(str(message).split())}\n")

    for ours in (CalibrationWarning, AttentionWarning):
        warnings.simplefilter("always", ours)
    warnings.showwarning = show


@contextmanager
def bars() -> Iterator[Progress]:
    """A function (what, done, total) that draws a progress bar for each thing that goes on."""
    from rich import progress as rich_progress

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.TextColumn("{task.fields[steps]}"),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TextColumn("left"),
        rich_progress.TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    tasks = {}
    shown = rich_progress.Progress(*columns, console=console, refresh_per_second=4)

    def update(what: str, done: int, total: int | None) -> None:
        if what not in tasks:
            shown.start()
            tasks[what] = shown.add_task(what, total=total, steps="")
        steps = f"step {done}/{total}" if total is not None and total > 1 else ""
        shown.update(tasks[what], completed=done, total=total, steps=steps)

    try:
        yield update
    finally:
        if tasks:
            shown.stop()


def complain(message: str) -> None:
    """One line on stderr."""
    typer.echo(" ".join(message.split()), err=True)


def print_json(content: dict) -> None:
    import json

    typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
