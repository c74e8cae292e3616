"""The folder of an evaluation: protocol, rows, videos, and frames until they are measured.

    DIR/protocol.json             what all samples have in common; written once, never changed
    DIR/rows/<worker>.jsonl       a row a finished sample
    DIR/failures/<worker>.jsonl   a row a failed attempt
    DIR/videos/<method>/          {prompt}-{seed}.mp4, or .png
    DIR/frames/<key>.npz          frames and latents not measured yet, and what their run said

A process that is killed at any instant leaves nothing that is wrong: files are renamed to their
names when they are whole, and of rows.jsonl a last line without its end does not count.
"""

import fcntl
import hashlib
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vdit_sparse.eval.files import new_file

PROTOCOL = "protocol.json"
# What may differ among samples that are compared: what was tried, and why not.
_TOLD_ONLY = ("baseline.seconds", "baseline.reasons", "left_out")


class StoreError(ValueError):
    """A folder that cannot be used or continued; one line says why and what to do."""


@dataclass(frozen=True, eq=False)
class Made:
    """What the run of a sample gave: frames uint8 `[T, 3, H, W]` and final latents fp32, on the CPU
    (None where the pipeline hands none out), and what the run said, as plain data."""

    frames: Tensor
    facts: dict
    latents: Tensor | None = None


class Store:
    """The part of the folder that one process writes; `worker` names its files.

    Raises StoreError if another process writes as the same worker, or if nothing can be written.
    """

    def __init__(self, folder: Path, worker: str = "main"):
        self.folder, self.worker = folder, worker
        try:
            for name in ("rows", "failures", "videos", "frames"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            self._rows = Lines(folder / "rows" / f"{worker}.jsonl")
            self._failures = Lines(folder / "failures" / f"{worker}.jsonl")
        except BlockingIOError:
            raise StoreError(
                f"Another process is writing to {folder} as {worker!r}: wait for it, or give each "
                "process its own --shard."
            ) from None
        except OSError as error:
            raise StoreError(f"Cannot write to {folder} ({error.strerror}).") from error

    def first(self, protocol: Mapping) -> dict:
        """The folder's protocol, which is this one if there was none."""
        file = self.folder / PROTOCOL
        if not file.exists():
            _create(file, json.dumps(protocol, indent=2, ensure_ascii=False) + "\n", self.worker)
        return read_protocol(self.folder)

    def agree(self, protocol: Mapping) -> dict:
        """The folder's protocol, as `first`. Raises StoreError, with what differs, if it is not
        this one."""
        found = self.first(protocol)
        differing = differences(found, protocol)
        if differing:
            raise StoreError(
                f"{self.folder} was made with other settings ({'; '.join(differing)}): name "
                "another --out, or give the same settings."
            )
        return found

    def append(self, row: Mapping) -> None:
        """Adds a finished sample; it is on the disk when this returns."""
        self._rows.append(row)

    def fail(self, row: Mapping) -> None:
        """Adds a failed attempt."""
        self._failures.append(row)

    def keep(self, key: str, made: Made) -> None:
        """Keeps frames and latents without loss, and what their run said (as JSON)."""
        arrays = {} if made.latents is None else {"latents": made.latents.numpy()}
        with new_file(self._frames(key)) as temporary, temporary.open("wb") as out:
            np.savez(out, frames=made.frames.numpy(), facts=json.dumps(made.facts), **arrays)

    def kept(self, key: str) -> Made | None:
        """What `keep` was given; None if it is not there, or if the disk has lost a part of it."""
        try:
            with np.load(self._frames(key), allow_pickle=False) as content:
                latents = torch.from_numpy(content["latents"]) if "latents" in content else None
                frames = torch.from_numpy(content["frames"])
                return Made(frames, json.loads(str(content["facts"])), latents)
        except (FileNotFoundError, zipfile.BadZipFile, ValueError, KeyError, EOFError):
            return None

    def forget(self, key: str) -> None:
        """Removes frames."""
        self._frames(key).unlink(missing_ok=True)

    def close(self) -> None:
        """Lets another process write as this worker."""
        self._rows.close()
        self._failures.close()

    def _frames(self, key: str) -> Path:
        return self.folder / "frames" / f"{key}.npz"


def read_protocol(folder: Path) -> dict:
    """Raises StoreError if there is none."""
    try:
        return json.loads((folder / PROTOCOL).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{folder} is no folder of `vdit-sparse eval run`: it has no readable {PROTOCOL}."
        ) from error


def read_rows(folder: Path, kind: str = "rows") -> list[dict]:
    """The rows of all workers; each key once, as there may be two attempts at a failure.

    Raises StoreError for a line that is no row.
    """
    found: dict[str, dict] = {}
    for file in sorted((folder / kind).glob("*.jsonl")):
        for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
            try:
                row = json.loads(line)
                found.setdefault(row["key"], row)
            except (ValueError, KeyError, TypeError) as error:
                raise StoreError(
                    f"{file}, line {number}: this is no row of a sample; remove the line, and the "
                    "sample is made again."
                ) from error
    return list(found.values())


def digest(protocol: Mapping) -> str:
    """16 hexadecimal digits of the SHA-256 of what all samples must have in common."""
    return content_hash(_compared(protocol))


def differences(one: Mapping, other: Mapping) -> list[str]:
    """ "name: value of one, value of the other" for whatever forbids comparing their samples."""
    first, second = _compared(one), _compared(other)
    shared = {**first, **second}
    missing = "nothing"
    return [
        f"{name}: {first.get(name, missing)} and {second.get(name, missing)}"
        for name in shared
        if first.get(name, missing) != second.get(name, missing)
    ]


def content_hash(content: object) -> str:
    """16 hexadecimal digits of the SHA-256 of plain data, whatever the order of its names."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _compared(protocol: Mapping) -> dict:
    flat = json.loads(json.dumps(dict(_flat(protocol))))
    return {name: value for name, value in flat.items() if not name.startswith(_TOLD_ONLY)}


def _flat(content: Mapping, before: str = "") -> Iterator[tuple[str, object]]:
    for name, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _create(file: Path, text: str, worker: str) -> None:
    """Writes a file that is not there yet; of several processes the first one's stays."""
    temporary = file.with_name(f".{worker}.{file.name}")
    temporary.write_text(text, encoding="utf-8")
    try:
        os.link(temporary, file)
    except FileExistsError:
        return
    finally:
        temporary.unlink()


class Lines:
    """A file of JSON lines with one writer; a last line that a killed one left unfinished goes."""

    def __init__(self, file: Path):
        self.descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self.descriptor)
            raise
        self.size = file.read_bytes().rfind(b"\n") + 1
        os.ftruncate(self.descriptor, self.size)

    def append(self, row: Mapping) -> None:
        rest = line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        try:
            while rest:
                rest = rest[os.write(self.descriptor, rest) :]
            os.fsync(self.descriptor)
        except OSError:
            os.ftruncate(self.descriptor, self.size)
            raise
        self.size += len(line)

    def close(self) -> None:
        os.close(self.descriptor)
