"""What `vdit-sparse generate` shows.

Only the standard library, typer and rich are imported here, as in `cli.py`.
"""

from rich.console import Console

from vdit_sparse.app.terminal import bars


def generate_and_show(words: dict) -> None:
    """Makes the videos that the command line asks for, and prints their table and files; of several
    processes, the first one does."""
    from vdit_sparse.app.generate import generate
    from vdit_sparse.app.processes import joined
    from vdit_sparse.app.report import FILE, table
    from vdit_sparse.app.request import parse_request

    with joined(parse_request(words)) as (request, shows):
        if not shows:
            generate(request, lambda what, done, total: None)
            return
        with bars() as progress:
            report = generate(request, progress)
    console = Console()
    console.print(table(report.runs))
    for file in (*report.files, FILE):
        console.print(str(request.out / file), highlight=False, soft_wrap=True)
