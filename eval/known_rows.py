"""JSON lines of what has been measured, so that a command that was cut off goes on."""

import json
from pathlib import Path


class KnownRows:
    """The rows of a file, which are in it as soon as they are kept. A last line that a killed run
    left unfinished does not count."""

    def __init__(self, file: Path):
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        content = file.read_bytes() if file.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            file.write_bytes(whole)
        self.rows = [json.loads(line) for line in whole.splitlines()]

    def find(self, **fields) -> dict | None:
        """The first row with these fields."""
        return next((row for row in self.rows if fields.items() <= row.items()), None)

    def keep(self, row: dict) -> dict:
        """The row, after it has been added."""
        with self.file.open("a") as out:
            out.write(json.dumps(row) + "\n")
        self.rows.append(row)
        return row
