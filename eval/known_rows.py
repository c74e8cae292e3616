"""JSON lines of what has been measured, so that a command that was cut off goes on."""

import json
from contextlib import closing
from pathlib import Path

from vdit_sparse.eval.store import Lines


class KnownRows:
    """The rows of a file, which are in it as soon as they are kept. A last line that a killed run
    left unfinished does not count."""

    def __init__(self, file: Path):
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        with closing(Lines(file)):
            self.rows = [json.loads(line) for line in file.read_bytes().splitlines()]

    def find(self, **fields) -> dict | None:
        """The first row with these fields."""
        return next((row for row in self.rows if fields.items() <= row.items()), None)

    def keep(self, row: dict) -> dict:
        """The row, after it has been added."""
        with closing(Lines(self.file)) as lines:
            lines.append(row)
        self.rows.append(row)
        return row
