"""Where a model comes from: its files in a folder or on the Hugging Face Hub, and what is wrong if
they cannot be had."""

import difflib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from vdit_sparse.pipelines.checkpoints import checkpoint_of, checkpoints

INDEX = "model_index.json"
# Endings of files that hold the weights of one transformer.
FILES = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin")


def source_of(model: str | Path) -> str | Path:
    """What a user's word for a model means: a folder or file as `Path`, or a hub id, also of a
    short name in the table. Raises FileNotFoundError for a path that is not there."""
    path = Path(model).expanduser()
    if path.exists():
        return path
    found = checkpoint_of(str(model))
    if found is not None:
        return found.hub
    if path.suffix.lower() in FILES:
        raise FileNotFoundError(f"There is no model file {model}.")
    if isinstance(model, Path) or str(model).startswith((".", "/", "~")):
        raise FileNotFoundError(f"There is no model folder {model}.")
    return model


def read_json(source: str | Path, name: str) -> dict:
    """A JSON file of a model in a folder or on the Hub. Raises FileNotFoundError if the model does
    not have it, and as `hub_errors`."""
    if isinstance(source, Path):
        file = source / name
        if not file.is_file():
            raise FileNotFoundError(f"{source} is not a diffusers model: it has no {name}.")
    else:
        with hub_errors(source):
            file = Path(hf_hub_download(source, name))
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}.") from error


@contextmanager
def hub_errors(model: str) -> Iterator[None]:
    """Says in one line what is wrong with a model on the Hub: PermissionError if it is gated,
    FileNotFoundError if it is not there or no diffusers model, ConnectionError without a network,
    ValueError if it is no id."""
    try:
        yield
    except GatedRepoError as error:
        raise PermissionError(
            f"{model} is gated: accept its licence at https://huggingface.co/{model}, then log in "
            "with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"There is no model {model} on the Hugging Face Hub (or it is private: `hf auth "
            f"login`), and no such folder.{_near(model)}"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.TransportError) as error:
        raise ConnectionError(
            f"Cannot load {model} from the Hugging Face Hub, and neither is it in this machine's "
            "cache nor is there such a folder: check the name, your network and HF_HUB_OFFLINE."
            f"{_near(model)}"
        ) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(
            f"{model} is on the Hub, but not in diffusers' format: it lacks a file that all such "
            f"models have.{_near(model)}"
        ) from error
    except HfHubHTTPError as error:
        said = " ".join(str(error).split())[:200]
        raise ConnectionError(f"The Hugging Face Hub refuses {model}: {said}") from error
    except HFValidationError as error:
        raise ValueError(
            f"{model} is neither a folder nor the id of a model on the Hub (owner/name)."
            f"{_near(model)}"
        ) from error


def _near(model: str) -> str:
    """A published checkpoint whose name is like this one, as a question."""
    names = [name for one in checkpoints() for name in (one.name, one.hub)]
    found = difflib.get_close_matches(model, names, n=1, cutoff=0.7)
    return f" Did you mean {found[0]}?" if found else ""
