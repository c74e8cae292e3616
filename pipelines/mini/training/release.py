"""Puts what a rented machine returned into the bundled model's folder, its figures into the card.

    python -m vdit_sparse.pipelines.mini.training.release FOLDER [FOLDER ...]

A FOLDER holds archives, whole (`NAME.tar`) or split (`NAME.aa`, `NAME.ab`, ...), with the model's
parts in `mini/` and reports in `reports/`; of several folders the later one counts. Nothing is
written unless the assembled model loads and is small enough. `card.py` says how reports look.
"""

import argparse
import io
import re
import shutil
import tarfile
from pathlib import Path
from string import ascii_lowercase
from tempfile import TemporaryDirectory

import torch
from diffusers import WanPipeline

from vdit_sparse.calibration import read_header
from vdit_sparse.pipelines.few_step import FOLDER as FEW_STEP
from vdit_sparse.pipelines.few_step import load_few_step
from vdit_sparse.pipelines.mini.training.card import fill, read_reports, size_table
from vdit_sparse.pipelines.mini.training.judge import SHIPPED, load_network
from vdit_sparse.pipelines.mini.training.pacing import report

BUNDLED = SHIPPED.parent
LIMIT = 64 * 2**20
WEIGHTS = ("transformer", "vae", "text_encoder")
MADE_FOR = (FEW_STEP, "calibrations")
"""Parts that belong to one transformer: another one needs new ones."""

PARTS = (*WEIGHTS, *MADE_FOR, "judge")
SHEET = "samples.jpg"
# What `split` calls its pieces, up to 26 of them.
_SPLIT = re.compile(r"(.+)\.(a[a-z])")


def release(folders: list[Path], model: Path, limit: int = LIMIT, keep_old: bool = False) -> int:
    """Replaces the parts of `model` that the folders bring, fills its card, returns its bytes.

    limit: most bytes of the whole folder, training code and sprites included.
    keep_old: allow a new transformer without new parts of `MADE_FOR`; the old few-step weights
        are taken out then, since they do not load with another transformer.

    Raises ValueError for archives that are cut off, for parts that are missing or too large, and
    whatever loading the assembled model raises.
    """
    with TemporaryDirectory() as temporary:
        found, new = Path(temporary) / "found", Path(temporary) / "new"
        for folder in folders:
            unpack(folder, found)
        brought = [part for part in PARTS if (found / "mini" / part).is_dir()]
        if not brought and not (found / "reports").is_dir():
            raise ValueError(
                f"Expected one of {', '.join(PARTS)} in mini/, or reports/, in "
                f"{', '.join(map(str, folders))} or archives there, found none: name the folder "
                "with what came back."
            )
        dropped = _outdated(brought, model, keep_old)
        shutil.copytree(model, new, ignore=shutil.ignore_patterns("__pycache__"))
        _replace(found / "mini", new, brought, dropped)
        if (found / "reports" / SHEET).is_file():
            shutil.copyfile(found / "reports" / SHEET, new / SHEET)
        verify(new)
        _write_card(found / "reports", new, brought)
        size = _checked_size(new, limit)
        _replace(new, model, brought, dropped)
        for name in {"README.md", SHEET} & {file.name for file in new.iterdir()}:
            shutil.copyfile(new / name, model / name)
    report(
        f"released {', '.join([*brought, 'the card'])} into {model}: {size:,} bytes of {limit:,}"
    )
    return size


def unpack(folder: Path, into: Path) -> None:
    """Unpacks every archive of a folder, and copies its `mini/` and `reports/` if it has them."""
    for name, parts in archives(folder).items():
        data = io.BytesIO(b"".join(part.read_bytes() for part in parts))
        try:
            with tarfile.open(fileobj=data) as archive:
                archive.extractall(into, filter="data")
        except tarfile.TarError as error:
            raise ValueError(
                f"The archive {name} in {folder} is cut off ({error}): expected all of its parts, "
                f"got {', '.join(part.name for part in parts)}."
            ) from error
    for name in ("mini", "reports"):
        if (folder / name).is_dir():
            shutil.copytree(folder / name, into / name, dirs_exist_ok=True)


def archives(folder: Path) -> dict[str, list[Path]]:
    """Name -> the parts of an archive in their order, one for a whole one. Raises ValueError where
    one is missing between others."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if (match := _SPLIT.fullmatch(file.name)) and file.is_file():
            parts = found.setdefault(match[1], [])
            expected = f"{match[1]}.a{ascii_lowercase[len(parts)]}"
            if file.name != expected:
                raise ValueError(f"Expected {expected} in {folder}, got {file.name} next.")
            parts.append(file)
    return found | {file.name: [file] for file in folder.glob("*.tar")}


def verify(model: Path) -> None:
    """Loads all parts of a model as their users do. Raises what they raise, and ValueError for
    weights that are not finite."""
    pipe = WanPipeline.from_pretrained(model, dtype=torch.bfloat16, local_files_only=True)
    for name in WEIGHTS:
        if not all(tensor.isfinite().all() for tensor in getattr(pipe, name).parameters()):
            raise ValueError(f"The weights of {name} are not finite: train again, or adopt others.")
    if (model / FEW_STEP).is_dir():
        load_few_step(pipe, model)
    if (model / "judge").is_dir():
        load_network(model / "judge")
    for file in sorted((model / "calibrations").glob("*.safetensors")):
        read_header(file)


def _outdated(brought: list[str], model: Path, keep_old: bool) -> list[str]:
    """Parts to take out; raises ValueError if `model` has parts for another transformer."""
    if "transformer" not in brought:
        return []
    old = [part for part in MADE_FOR if part not in brought and (model / part).is_dir()]
    if old and not keep_old:
        raise ValueError(
            f"The transformer is new, but {' and '.join(old)} in {model} would stay those of the "
            "old one: bring new ones too, or say --keep-old."
        )
    return [part for part in old if part == FEW_STEP]


def _replace(source: Path, target: Path, parts: list[str], dropped: list[str]) -> None:
    for part in (*parts, *dropped):
        shutil.rmtree(target / part, ignore_errors=True)
    for part in parts:
        # Contents alone: safetensors' own files would be readable by their owner only.
        shutil.copytree(source / part, target / part, copy_function=shutil.copyfile)


def _write_card(reports: Path, new: Path, changed: list[str]) -> None:
    card = new / "README.md"
    found = read_reports(reports)
    text = fill(card.read_text(), found, changed)
    # The table of sizes is part of what it measures: its second filling has the final length.
    for _ in range(2):
        card.write_text(fill(text, {"size": {"markdown": size_table(new)}}, ()))


def _checked_size(new: Path, limit: int) -> int:
    size = sum(file.stat().st_size for file in new.rglob("*") if file.is_file())
    if size > limit:
        raise ValueError(
            f"Expected at most {limit:,} bytes in the model's folder, got {size:,}:\n"
            f"{size_table(new)}\nA smaller rank of the LoRA (`distill --rank`) or judge helps."
        )
    return size


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="release", description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--limit", type=int, default=LIMIT, help="bytes of the whole folder")
    parser.add_argument("--keep-old", action="store_true", help="a new transformer alone")
    options = parser.parse_args(words)
    release(options.folders, options.model, options.limit, options.keep_old)


if __name__ == "__main__":
    main()
