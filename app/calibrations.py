"""Whether the calibrations of a request's methods are for its video, before anything runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vdit_sparse.app.options import InputError, RunChoice
from vdit_sparse.app.request import Request
from vdit_sparse.calibration import CalibratedAttention, read_header
from vdit_sparse.pipelines.checkpoints import Checkpoint

# Pipelines whose self-attention sees the tokens of the video that is asked for. Others see those of
# references too (LTX, VACE), of parts of it (SkyReels' forcing), or of another size (Kontext): what
# their calibrations must be for is known when they run.
PLAIN = (
    *("AllegroPipeline", "CogVideoXPipeline", "CogVideoXImageToVideoPipeline"),
    *("CosmosTextToWorldPipeline", "Cosmos2VideoToWorldPipeline"),
    *("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline", "HunyuanVideo15Pipeline"),
    *("Kandinsky5T2VPipeline", "Kandinsky5I2VPipeline", "MochiPipeline"),
    *("SkyReelsV2Pipeline", "SkyReelsV2ImageToVideoPipeline"),
    *("WanPipeline", "WanImageToVideoPipeline"),
)


@dataclass(frozen=True)
class Source:
    """What is known of a model's files or pipeline.

    checkpoint: its geometry, or None; pipeline: the name of its class; settings: arguments of its
    call where the caller gives none; folder: of the calibrations that come with it, "" for none,
    None where that is not known.
    """

    checkpoint: Checkpoint | None = None
    pipeline: str = ""
    settings: Mapping = field(default_factory=dict)
    folder: str | None = None

    def video(self, request: Request) -> tuple[int, int, int] | None:
        """(height, width, frames) that the request comes to; None where that is not known."""
        if self.checkpoint is None or self.pipeline not in PLAIN:
            return None
        settings = {**stock_defaults(self.pipeline), **self.settings}
        height, width = request.size or (settings.get("height"), settings.get("width"))
        frames = request.num_frames or settings.get("num_frames")
        return None if None in (height, width, frames) else (height, width, frames)


def stock_defaults(pipeline: str) -> dict:
    """The defaults of a call, by the name of the pipeline's class. Imports diffusers."""
    from vdit_sparse.pipelines.load import stock_parameters

    return {name: each.default for name, each in stock_parameters(pipeline).items()}


def check_calibrations(request: Request, source: Source) -> None:
    """Raises InputError for a calibration that is not there, that is of another method, or that is
    for another size or length than the request comes to; what `source` does not say passes."""
    calibrated = [x for x in request.runs if isinstance(x.method, CalibratedAttention)]
    found = [(x, grids) for x in calibrated if (grids := _grids(x, source.folder)) is not None]
    video = source.video(request) if found else None
    for choice, grids in found:
        if not grids:
            raise InputError(_missing(choice, video))
        if video is not None and _grid(source.checkpoint, video) not in grids:
            raise InputError(_unfit(choice, grids, video, source.checkpoint))


def _grids(choice: RunChoice, own: str | None) -> list[list[int]] | None:
    """Frames, height and width in tokens that a run has calibrations for; None: not known."""
    path, wanted = choice.method.calibration, type(choice.method).__name__
    if path is None:
        path = own
    if not path:
        return None if path is None else []
    several = Path(path).is_dir()
    files = Path(path).glob("*.safetensors") if several else [path]
    try:
        headers = [read_header(file) for file in files]
    except (FileNotFoundError, ValueError) as error:
        raise InputError(str(error)) from error
    if not several and headers[0]["method"] != wanted:
        raise InputError(f"{path} is a calibration of {headers[0]['method']}, not of {wanted}.")
    return sorted(header["grid"][:3] for header in headers if header["method"] == wanted)


def _grid(one: Checkpoint, video: tuple[int, int, int]) -> list[int]:
    try:
        grid = one.grid(*video)
    except ValueError as error:
        raise InputError(f"This model does not make such a video: {error}") from error
    return [grid.frames, grid.height, grid.width]


def _missing(choice: RunChoice, video: tuple[int, int, int] | None) -> str:
    where = choice.method.calibration
    place = Path(where).name if where else "the checkpoint"
    return (
        f"Method {choice.preset or choice.name} needs a calibration for this model and size, and "
        f"{place} has none: make one with {_command(choice, video)} and give the method that file."
    )


def _unfit(choice: RunChoice, grids: list[list[int]], video, one: Checkpoint) -> str:
    height, width, frames = video
    there = " and ".join(dict.fromkeys(_words(one, grid) for grid in grids))
    where = choice.method.calibration
    return (
        f"The calibration of {choice.preset or choice.name} "
        f"({Path(where).name if where else 'the one that comes with the model'}) is for {there}, "
        f"but {frames} frames of {height}x{width} were asked for: ask for what it is for, or make "
        f"one with {_command(choice, video)} and give the method that file."
    )


def _command(choice: RunChoice, video: tuple[int, int, int] | None) -> str:
    """The start of the command line that makes such a file."""
    words = ["vdit-sparse", *_MAKERS.get(choice.name, ("calibrate", "--method", choice.name))]
    if video is not None:
        height, width, frames = video
        words += ["--size", f"{height}x{width}", "--num-frames", str(frames)]
    return f"`{' '.join(words)} ...`"


_MAKERS = {"tuned": ("tune", "--density", "0.3")}


def _words(one: Checkpoint, grid: list[int]) -> str:
    """A grid as a video that has it."""
    frames, height, width = grid
    count = (frames * one.patch_t - one.first_frame) * one.temporal + one.first_frame
    return f"{count} frames of {height * one.pixels}x{width * one.pixels}"
