"""Everything that can be known to be wrong before the model is loaded, or before it runs."""

import importlib.util
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

from vdit_sparse.app.calibrations import Source, check_calibrations
from vdit_sparse.app.options import InputError
from vdit_sparse.app.request import Request
from vdit_sparse.eval.denoise import call_parameters, makes_images
from vdit_sparse.pipelines.checkpoints import Checkpoint, checkpoint_like, checkpoint_of

MOST_SEED = 2**63 - 1
# What is asked for where the bundled model is: itself, or its few-step variant.
BUNDLED = (None, "mini-fast")


@dataclass(frozen=True)
class Geometry:
    """What a model asks of a video's size: multiples of `height` and `width` pixels, and `first`
    frames more than a multiple of `frames`."""

    height: int
    width: int
    frames: int
    first: int = 1


def check_before_loading(request: Request) -> None:
    """Raises InputError for whatever is wrong with a request without knowing its model."""
    if not request.prompt.strip():
        raise InputError("--prompt is empty: describe the video in a sentence.")
    for option, value, least in (
        ("--steps", request.steps, 1),
        ("--num-frames", request.num_frames, 1),
        ("--guidance-scale", request.guidance_scale, 0),
        ("--seed", request.seed, 0),
    ):
        if value is not None and not value >= least:
            raise InputError(f"{option} must be at least {least}, got {value}.")
    if request.seed > MOST_SEED:
        raise InputError(f"--seed must be at most {MOST_SEED}, got {request.seed}.")
    device = check_device(request.device)
    if request.offload != "none" and device.type == "cpu":
        raise InputError(f"--offload {request.offload} needs a GPU, but the device is the CPU.")
    if request.loras and importlib.util.find_spec("peft") is None:
        raise InputError("--lora needs the package peft: run `pip install peft`.")
    geometry = geometry_of_folder(request.model)
    if geometry is not None:
        check_size(geometry, request.size, request.num_frames)
    check_calibrations(request, source_of_folder(request.model))
    check_folder(request.out, request.overwrite)


def check_device(name: str | None) -> torch.device:
    """The device of that name, or the default one. Raises InputError if it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device must be cpu, cuda, cuda:1, ... or mps, got {name!r}.") from None
    found = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }.get(device.type, 0)
    if (device.index or 0) >= found:
        raise InputError(
            f"--device {name}: torch finds {found or 'no'} {device.type} device"
            f"{'s' if found > 1 else ''} here; use another one, such as cpu, or see "
            "`vdit-sparse doctor`."
        )
    return device


def check_folder(out: Path, overwrite: bool) -> None:
    """Makes the output folder and tries to write into it. Raises InputError if that fails, or if
    there is something in it and it may not be overwritten."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
        occupied = any(out.iterdir())
    except FileExistsError:
        raise InputError(f"--out {out} is a file: name a folder.") from None
    except OSError as error:
        raise InputError(
            f"Cannot write to --out {out} ({error.strerror}): name a folder that you may write to."
        ) from error
    if occupied and not overwrite:
        raise InputError(f"--out {out} is not empty: name another folder, or add --overwrite.")


def read_image(path: Path | None) -> Image.Image | None:
    """The image as RGB. Raises InputError if there is none that can be read."""
    if path is None:
        return None
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"There is no image {path}.") from None
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InputError(f"Cannot read the image {path}: {error}.") from error


def geometry_of_folder(model: str | Path | None) -> Geometry | None:
    """The geometry of the bundled model (None or mini-fast), of a published one or of a model in a
    folder, read off its configuration; None where that does not say."""
    found = source_of_folder(model).checkpoint
    return None if found is None else _geometry(found)


def source_of_folder(model: str | Path | None) -> Source:
    """What is known, before it is loaded, of the models that `geometry_of_folder` knows."""
    published = checkpoint_of(str(model))
    if published is not None:
        return Source(published, published.pipeline)
    folder = bundled_model() if model in BUNDLED else Path(model)
    try:
        index, vae, transformer = (
            json.loads((folder / name).read_text())
            for name in ("model_index.json", "vae/config.json", "transformer/config.json")
        )
        like = checkpoint_like(transformer["_class_name"], transformer, vae)
        own = folder / "generation.json"
        settings = json.loads(own.read_text()) if own.is_file() else {}
        found = folder / "calibrations"
        return Source(like, index["_class_name"], settings, str(found) if found.is_dir() else "")
    except (OSError, ValueError, KeyError):
        return Source()


def geometry_of(pipe) -> Geometry | None:
    """The geometry of a loaded pipeline; None where nothing is known of its class."""
    found = _checkpoint_of(pipe)
    return None if found is None else _geometry(found)


def _checkpoint_of(pipe) -> Checkpoint | None:
    transformer = pipe.transformer or pipe.transformer_2
    try:
        return checkpoint_like(type(transformer).__name__, transformer.config, pipe.vae.config)
    except (AttributeError, ValueError):  # a pipeline without an autoencoder, an unknown class
        return None


def smallest_size(pipe) -> dict[str, int]:
    """Arguments of the pipeline's call for a very small video or image; none where it is not known
    how small it can be."""
    unit = geometry_of(pipe)
    if unit is None or "scale_factor_temporal" not in pipe.vae.config:
        return {}
    small = {"height": 2 * unit.height, "width": 2 * unit.width, "num_frames": unit.frames + 1}
    # Autoencoders of videos serve models of images too, whose calls have no frames.
    return {name: value for name, value in small.items() if name in call_parameters(pipe)}


def check_size(
    geometry: Geometry, size: tuple[int, int] | None, num_frames: int | None = None
) -> None:
    """Raises InputError, with the nearest sizes that are possible, for one that is not."""
    for name, pixels, unit in zip(
        ("height", "width"), size or (), (geometry.height, geometry.width), strict=False
    ):
        if pixels < unit or pixels % unit:
            low = pixels // unit * unit
            near = [str(x) for x in (low, low + unit) if x]
            raise InputError(
                f"--size: the {name} of this model must be a multiple of {unit} pixels, got "
                f"{pixels}; nearest: {' and '.join(near)}."
            )
    first = geometry.first
    if num_frames is not None and (num_frames - first) % geometry.frames:
        low = (num_frames - first) // geometry.frames * geometry.frames + first
        more = "1 more than " if first else ""
        raise InputError(
            f"--num-frames of this model must be {more}a multiple of {geometry.frames}, got "
            f"{num_frames}; nearest: {low} and {low + geometry.frames}."
        )


def check_after_loading(pipe, request: Request) -> None:
    """Raises InputError for what only the loaded pipeline can tell: sizes and calibrations of
    models from the hub, presets of another family, a missing or superfluous image."""
    from vdit_sparse.pipelines.families import family_of
    from vdit_sparse.pipelines.target import origin_of

    geometry = geometry_of(pipe)
    if geometry is not None:
        check_size(geometry, request.size, request.num_frames)
    transformer = pipe.transformer or pipe.transformer_2
    folder = origin_of(pipe, "transformer", transformer).calibrations
    source = Source(_checkpoint_of(pipe), type(pipe).__name__, pipe.generation, folder)
    check_calibrations(request, source)
    presets = family_of(transformer).presets
    for choice in request.runs:
        if choice.preset is not None and choice.preset not in presets:
            raise InputError(
                f"Preset {choice.preset!r} is of another model; this one has: {', '.join(presets)}."
            )
    # Models of images (FLUX.2, Kontext) edit one or make one.
    needs_image = "image" in call_parameters(pipe) and not makes_images(pipe)
    if needs_image and request.image is None:
        raise InputError("This model makes videos from images: give one with --image FILE.")


def bundled_model() -> Path:
    """The folder of the bundled model, found without importing diffusers."""
    import vdit_sparse

    homes = [Path(home) / "pipelines" / "mini" for home in vdit_sparse.__path__]
    return next((home for home in homes if home.is_dir()), homes[0])


def _geometry(one: Checkpoint) -> Geometry:
    return Geometry(one.pixels, one.pixels, one.temporal, one.first_frame)
