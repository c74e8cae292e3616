"""The users' files: a folder for each user, in it a folder for each run, and who may read what."""

import hashlib
import json
import re
import secrets
import shutil
import time
from pathlib import Path

from vdit_sparse.eval.files import new_file

# What a run is called, and a file of it: nothing that could lead elsewhere.
NAME = re.compile(r"[0-9a-f]{32}")
FILE = re.compile(r"[a-z0-9][a-zA-Z0-9_-]*\.(mp4|png|json|py|txt|bin|safetensors)")
CARD = "studio.json"
# Uploads of one user that stay.
UPLOADS = 10


def new_name() -> str:
    """A name that nobody guesses."""
    return secrets.token_hex(16)


def owner_of(secret: str) -> str:
    """The key of a user: the folders do not give the secret away."""
    return hashlib.sha256(secret.encode()).hexdigest()[:32]


class Store:
    """Runs on the disk, at most `kept` of each user."""

    def __init__(self, root: Path, kept: int):
        self.root, self.kept = root, kept

    def folder(self, owner: str, name: str) -> Path:
        """The folder of a run, whether it is there or not."""
        if not NAME.fullmatch(owner) or not NAME.fullmatch(name):
            raise ValueError(f"Expected two names of 32 hex digits, got {owner!r} and {name!r}.")
        return self.root / "users" / owner / name

    def upload(self, owner: str, content: bytes) -> str:
        """Keeps what a user has sent, and takes their oldest out; the name that stands for it."""
        folder = self.folder(owner, "0" * 32).with_name("uploads")
        folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(content).hexdigest()[:32]
        with new_file(folder / name) as temporary:
            temporary.write_bytes(content)
        for old in sorted(folder.iterdir(), key=lambda file: -file.stat().st_mtime)[UPLOADS:]:
            old.unlink(missing_ok=True)
        return name

    def uploads(self, owner: str) -> dict[str, Path]:
        """What a user has uploaded, by the names that `upload` gave."""
        found = self.folder(owner, "0" * 32).with_name("uploads").glob("*")
        return {file.name: file for file in found if NAME.fullmatch(file.name)}

    def file(self, owner: str, name: str, file: str) -> Path | None:
        """A file of a user's run, or None if there is none of that name."""
        if not NAME.fullmatch(name) or not FILE.fullmatch(file):
            return None
        path = self.folder(owner, name) / file
        return path if path.is_file() else None

    def keep(self, owner: str, name: str, card: dict) -> None:
        """Puts a finished run into the user's gallery, and takes the oldest out."""
        with new_file(self.folder(owner, name) / CARD) as temporary:
            temporary.write_text(json.dumps({**card, "name": name, "at": time.time()}))
        for old in self.cards(owner)[self.kept :]:
            self.remove(owner, old["name"])

    def cards(self, owner: str) -> list[dict]:
        """The finished runs of a user, newest first."""
        if not NAME.fullmatch(owner):
            return []
        found = (self.root / "users" / owner).glob(f"*/{CARD}")
        cards = [card for file in found if (card := _read(file)) is not None]
        return sorted(cards, key=lambda card: -card["at"])

    def card(self, owner: str, name: str) -> dict | None:
        """A finished run of a user, or None."""
        return _read(self.folder(owner, name) / CARD) if NAME.fullmatch(name) else None

    def remove(self, owner: str, name: str) -> None:
        """Deletes a run and its files."""
        shutil.rmtree(self.folder(owner, name), ignore_errors=True)


def _read(file: Path) -> dict | None:
    try:
        card = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return card if isinstance(card, dict) and {"name", "at"} <= card.keys() else None
