"""The models that a studio offers: what each is, and which names a user may give."""

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vdit_sparse.app.checks import BUNDLED, Geometry, bundled_model, geometry_of_folder
from vdit_sparse.app.demo.limits import Studio
from vdit_sparse.app.options import InputError
from vdit_sparse.eval.denoise import FRAMES
from vdit_sparse.methods import METHODS
from vdit_sparse.pipelines.checkpoints import checkpoint_of
from vdit_sparse.pipelines.images import refuses_images

BUNDLED_NAME = "bundled"
FEW_STEP_NAME = "mini-fast"
# Formats that run code when they are read.
PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
# Pixels of an image's side, where neither its call nor its transformer has a size of its own.
IMAGE_SIDE = 1024
ARGUMENTS = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")


@dataclass(frozen=True)
class Known:
    """What can be said of a model without loading it; empty or None where nothing is known.

    defaults: arguments of its call; geometry: sizes that it can have; presets: names; takes_image:
    whether it makes videos from an image. images: whether it makes images, not videos; refused:
    names of methods that it cannot run.
    """

    defaults: dict
    geometry: Geometry | None
    presets: tuple[str, ...]
    takes_image: bool
    images: bool = False
    refused: tuple[str, ...] = ()


def offered(studio: Studio) -> list[str]:
    """Names of the models to choose from: the bundled one, the same in few steps, those that the
    studio was started with, and the folders below its root that hold one."""
    names = [BUNDLED_NAME, FEW_STEP_NAME, *studio.models]
    if studio.root is not None:
        found = sorted(studio.root.glob("*/model_index.json"))
        found += sorted(studio.root.glob("*/*/model_index.json"))
        names += [str(file.parent.relative_to(studio.root)) for file in found]
    return list(dict.fromkeys(names))


def resolve(name: str, studio: Studio) -> str | None:
    """What `load_pipeline` takes for a name that a user gave. Raises InputError for one that this
    studio does not offer, outside its root, or with weights that are pickles."""
    if name in ("", BUNDLED_NAME):
        return None
    if name == FEW_STEP_NAME or name in studio.models:
        return name
    folder = _below_root(name, studio)
    pickled = sorted(file.name for file in folder.rglob("*") if file.suffix in PICKLES)
    if pickled:
        raise InputError(
            f"The model {name} has files that run code when they are read ({pickled[0]}): save it "
            "as safetensors."
        )
    return str(folder)


def _below_root(name: str, studio: Studio) -> Path:
    refused = InputError(
        f"This studio has no model {name[:80]!r}. Choose one of the list, or ask whoever runs it "
        "to start it with --model."
    )
    # A path of the system's is judged after every link and ".." in it.
    if studio.root is None or "\0" in name:
        raise refused
    root = studio.root.resolve()
    folder = (root / name).resolve()
    if not folder.is_relative_to(root) or not (folder / "model_index.json").is_file():
        raise refused
    return folder


def known(model: str | None) -> Known:
    """What the files of a model say, of a published one the table of those; nothing of another one
    that is not here. `model` as `resolve` gives it."""
    published = checkpoint_of(str(model))
    if published is None:
        pipeline, config, own = _of_folder(model)
    else:
        height, width = published.size
        own = {"height": height, "width": width, "num_inference_steps": published.steps}
        pipeline, config = published.pipeline, {"_class_name": published.transformer}
        own |= {"num_frames": published.frames} if published.frames > 1 else {}
    stock = _parameters(pipeline)
    images = bool(stock) and not FRAMES & stock.keys()
    arguments = {name: stock[name].default for name in ARGUMENTS if name in stock}
    if images and arguments.get("height", 0) is None:
        side = 8 * config["sample_size"] if "sample_size" in config else IMAGE_SIDE
        arguments |= {"height": side, "width": side}
    return Known(
        {**arguments, "fps": 16, **own},
        geometry_of_folder(model),
        _presets(config.get("_class_name"), model),
        "image" in stock,
        images,
        tuple(name for name in METHODS if images and refuses_images(None, METHODS[name]())),
    )


def _of_folder(model: str | None) -> tuple[str | None, dict, dict]:
    """What the files of a model say: the class of its pipeline, the configuration of its
    transformer, and the arguments that it brings along."""
    folder = bundled_model() if model in BUNDLED else Path(model)
    own = _json(folder / "generation.json")
    if model == FEW_STEP_NAME:
        own |= _json(folder / "transformer_fast/generation.json")
    pipeline = _json(folder / "model_index.json").get("_class_name")
    return pipeline, _json(folder / "transformer/config.json"), own


def _parameters(pipeline: str | None) -> Mapping[str, inspect.Parameter]:
    from vdit_sparse.pipelines.load import PIPELINES, stock_parameters

    return stock_parameters(pipeline) if pipeline in PIPELINES else {}


def _presets(transformer: str | None, model: str | None) -> tuple[str, ...]:
    """The presets of a transformer's class; those for the bundled model, or for it in few steps,
    are for that alone."""
    from vdit_sparse.app.options import presets_by_family

    names = presets_by_family().get(transformer, ())
    own = {None: "-mini", FEW_STEP_NAME: "-mini-fast"}.get(model)
    if own is not None:
        return tuple(name for name in names if name.endswith(own))
    return tuple(name for name in names if "-mini" not in name)


def _json(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
