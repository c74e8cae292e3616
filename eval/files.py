"""Files that are whole or not there, and the names of samples."""

import contextlib
import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

# With the longest seed, suffix and marks of a temporary file: under the 255 bytes of most disks.
MOST_BYTES = 220
_UNSAFE = re.compile(r"[/\\\x00-\x1f\x7f]")


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; renamed to it when the block ends, removed if it fails or is
    interrupted. So a file under its final name is always whole."""
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def stems(texts: Sequence[str]) -> tuple[str, ...]:
    """File names, without index and suffix, for texts that are all different.

    A text is its own name, as VBench looks for it. It gets a mark of its own ("~" and eight hex
    digits of its SHA-256) where that cannot be: if it holds a slash, backslash or control
    character (replaced by "_"), begins with a dot, is longer than 220 bytes (cut), or differs from
    an earlier one only in case or Unicode form, which some disks do not tell apart. Raises
    ValueError for a text that comes twice.
    """
    twice = next((text for text, count in Counter(texts).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"The prompt {twice!r} comes twice: leave one out.")
    names, taken = [], set()
    for text in texts:
        name = _UNSAFE.sub("_", text)
        if name != text or name.startswith(".") or len(name.encode()) > MOST_BYTES:
            name = marked_stem(text)
        if _folded(name) in taken:
            name = marked_stem(text)
        taken.add(_folded(name))
        names.append(name)
    return tuple(names)


def marked_stem(text: str) -> str:
    """The name with a mark that `stems` gives a text where its own cannot be."""
    return _marked(_UNSAFE.sub("_", text).lstrip("."), text)


def sample_name(stem: str, seed: int, suffix: str) -> str:
    """`{prompt}-{index}.mp4`, as VBench wants it; the index is the seed."""
    return f"{stem}-{seed}{suffix}"


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _marked(name: str, text: str) -> str:
    mark = f"~{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    room = MOST_BYTES - len(mark)
    return name.encode()[:room].decode(errors="ignore").rstrip() + mark
