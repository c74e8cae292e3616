"""Prompt suites: the bundled ones (TOML data), a user's TOML or CSV, the prompts of VBench."""

import csv
import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vdit_sparse.pipelines.mini.training.captions import Item, Spec

FOLDER = Path(__file__).parent / "suites"
VIDEO, IMAGE = "video", "image"
_FIELDS = ("text", "negative", "image", "shows")
_SUITE_FIELDS = ("about", "media", "prompts", "vbench")


class SuiteError(ValueError):
    """A suite that cannot be used; one line says where and what to do."""


@dataclass(frozen=True)
class Prompt:
    """What one clip is asked to show.

    negative: what to avoid, None for what the command says; image: first frame, for models that
    take one; shows: what the text means in the bundled model's grammar, where it is known.
    """

    text: str
    negative: str | None = None
    image: Path | None = None
    shows: Spec | None = None


@dataclass(frozen=True)
class Suite:
    """Prompts in their order, all different, and whether they ask for videos or for images."""

    name: str
    prompts: tuple[Prompt, ...]
    media: str = VIDEO
    about: str = field(default="", compare=False)

    def __post_init__(self):
        if not self.prompts:
            raise SuiteError(f"The suite {self.name} has no prompts.")
        seen: set[str] = set()
        for prompt in self.prompts:
            if not prompt.text.strip() or any(ord(letter) < 32 for letter in prompt.text):
                raise SuiteError(
                    f"The suite {self.name} has an empty prompt, or one with control characters: "
                    f"{prompt.text!r}."
                )
            if prompt.text in seen:
                raise SuiteError(f"The suite {self.name} has a prompt twice: {prompt.text!r}.")
            seen.add(prompt.text)

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides what is generated; of images their content."""
        content = [_content(prompt) for prompt in self.prompts]
        text = json.dumps([self.media, content], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


def names() -> tuple[str, ...]:
    """The bundled suites."""
    return tuple(sorted(file.stem for file in FOLDER.glob("*.toml")))


def read_suite(source: str, vbench: Path | None = None, images: Path | None = None) -> Suite:
    """A bundled suite by its name, or one in a file.

    source: a name in `names()`, or a path: `.toml` (as those in eval/suites), `.csv` (columns
        prompt, and if wanted negative_prompt and image), `.json` (a VBench_full_info.json, all of
        it). Paths in a file are relative to it.
    vbench: the VBench_full_info.json that the suites vbench* read; of vbench_i2v VBench-I2V's
        vbench2_i2v_full_info.json (arXiv 2411.13503).
    images: folder of the first frames that such a file names.

    Raises SuiteError, which names the file, its line or entry, and what to do.
    """
    file = Path(source)
    if source in names():
        return _from_toml(FOLDER / f"{source}.toml", vbench, images)
    if file.suffix not in _READERS:
        raise SuiteError(
            f"There is no suite {source!r}: name one of {', '.join(names())}, or a file that ends "
            f"in {', '.join(('.txt', *_READERS))}."
        )
    return _READERS[file.suffix](file, vbench, images)


def _from_toml(file: Path, vbench: Path | None, images: Path | None) -> Suite:
    try:
        content = tomllib.loads(_text(file))
    except tomllib.TOMLDecodeError as error:
        raise SuiteError(f"{file} is no TOML: {error}.") from error
    _check_names(file, content, _SUITE_FIELDS)
    media = content.get("media", VIDEO)
    if media not in (VIDEO, IMAGE):
        raise SuiteError(f'{file}: media must be "{VIDEO}" or "{IMAGE}", got {media!r}.')
    if ("prompts" in content) == ("vbench" in content):
        raise SuiteError(f"{file} needs either `prompts` or a table [vbench].")
    if "vbench" in content:
        prompts = _from_vbench(file.stem, content["vbench"], vbench, images)
    else:
        prompts = [_prompt(file, number, each) for number, each in _numbered(content["prompts"])]
    return Suite(file.stem, tuple(prompts), media, content.get("about", ""))


def _prompt(file: Path, number: int, entry: object) -> Prompt:
    where = f"{file}, prompt {number}"
    if isinstance(entry, str):
        return Prompt(entry)
    if not isinstance(entry, Mapping) or not isinstance(entry.get("text"), str):
        raise SuiteError(f"{where}: expected a text, or a table with `text`, got {entry!r}.")
    _check_names(where, entry, _FIELDS)
    shown = entry.get("shows")
    try:
        spec = None if shown is None else _spec(entry["text"], shown)
    except (ValueError, TypeError, KeyError) as error:
        raise SuiteError(f"{where}: `shows` is not of the grammar ({error}).") from error
    image = entry.get("image")
    path = None if image is None else file.parent / image
    return Prompt(entry["text"], entry.get("negative"), path, spec)


def _spec(text: str, shown: Mapping) -> Spec:
    items = tuple(Item(**item) for item in shown["items"])
    return Spec(**{**shown, "items": items, "caption": text})


def _from_csv(file: Path, *_: Path | None) -> Suite:
    try:
        rows = list(csv.DictReader(_text(file).splitlines(), strict=True, skipinitialspace=True))
    except csv.Error as error:
        raise SuiteError(f"{file} is no CSV: {error}.") from error
    prompts = []
    for number, row in enumerate(rows, 2):
        if not (row.get("prompt") or "").strip() or None in row:
            raise SuiteError(
                f"{file}, row {number}: expected a column `prompt` (and negative_prompt, image), "
                f"quoted where it holds commas, got {row}."
            )
        image = row.get("image")
        path = file.parent / image if image else None
        prompts.append(Prompt(row["prompt"].strip(), row.get("negative_prompt") or None, path))
    return Suite(file.stem, tuple(prompts), about=f"the prompts of {file.name}")


def _from_json(file: Path, _: Path | None, images: Path | None) -> Suite:
    return Suite(file.stem, tuple(_from_vbench(file.stem, {}, file, images)), about="VBench")


_READERS = {".toml": _from_toml, ".csv": _from_csv, ".json": _from_json}


def _from_vbench(
    name: str, wanted: Mapping, info: Path | None, images: Path | None
) -> list[Prompt]:
    """Prompts of the entries with one of the dimensions, each text once, in the file's order."""
    if info is None:
        raise SuiteError(
            f"The suite {name} reads VBench's prompts: give --prompts VBench_full_info.json, which "
            "comes with the package vbench (vbench/VBench_full_info.json); for vbench_i2v "
            "vbench2_i2v_full_info.json of VBench's repository (vbench2_beta_i2v/)."
        )
    dimensions = set(wanted.get("dimensions", ()))
    entries = read_vbench(info)
    chosen = [x for x in entries if not dimensions or dimensions & set(x["dimension"])]
    expected = wanted.get("entries")
    if expected is not None and len(chosen) != expected:
        raise SuiteError(
            f"The suite {name} is {expected} entries of VBench, but {info} has {len(chosen)}: use "
            "the file of VBench 0.1.5."
        )
    frames = {entry["prompt_en"]: entry.get("image_name") for entry in reversed(chosen)}
    _check_images(info, [frame for frame in frames.values() if frame], images)
    texts = dict.fromkeys(entry["prompt_en"] for entry in chosen)
    return [Prompt(x, image=images / frames[x] if frames[x] else None) for x in texts]


def _check_images(info: Path, frames: list[str], images: Path | None) -> None:
    if frames and images is None:
        raise SuiteError(
            f"The prompts of {info} have first frames: give --image DIR, their folder (of "
            "VBench-I2V that of the video's shape, such as vbench2_beta_i2v/data/crop/16-9)."
        )
    missing = [frame for frame in frames if not (images / frame).is_file()]
    if missing:
        raise SuiteError(
            f"{len(missing)} of {len(frames)} first frames are not in --image {images}, the first "
            f"{missing[0]!r}: name the folder of the images themselves."
        )


def read_vbench(info: Path) -> list[dict]:
    """The entries of a VBench_full_info.json. Raises SuiteError if it is none."""
    try:
        entries = json.loads(_text(info))
        for entry in entries:
            if not isinstance(entry["prompt_en"], str) or not isinstance(entry["dimension"], list):
                raise TypeError("prompt_en is a text, dimension a list")
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, SuiteError):
            raise
        raise SuiteError(
            f"{info} is no VBench_full_info.json: expected a list of entries with prompt_en and "
            f"dimension ({error!r})."
        ) from error
    return entries


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SuiteError(f"{file} is no UTF-8 text ({error.reason}): save it as UTF-8.") from error
    except OSError as error:
        raise SuiteError(f"Cannot read {file} ({error.strerror}).") from error


def _check_names(where: object, given: Mapping, known: Iterable[str]) -> None:
    unknown = set(given) - set(known)
    if unknown:
        raise SuiteError(
            f"{where}: unknown {', '.join(sorted(unknown))}; there are: {', '.join(known)}."
        )


def _numbered(entries: object) -> Iterable[tuple[int, object]]:
    return enumerate(entries if isinstance(entries, list) else [entries], 1)


def _content(prompt: Prompt) -> list:
    image = prompt.image
    seen = hashlib.sha256(image.read_bytes()).hexdigest() if image and image.is_file() else None
    shown = None if prompt.shows is None else asdict(prompt.shows)
    return [prompt.text, prompt.negative, seen or (str(image) if image else None), shown]
