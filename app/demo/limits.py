"""What one studio offers and how much of it: models, folders, and what a request may ask for."""

from dataclasses import dataclass, field
from pathlib import Path

from vdit_sparse.app.options import InputError
from vdit_sparse.app.request import Request

MEGABYTE = 2**20
# An image is one frame, so it may have more pixels than a video's.
LARGER = 2


@dataclass(frozen=True)
class Limits:
    """The most that one request, one user or all of them may have.

    pixels: height times width of a frame, an image may have twice as many; frames, steps: of a
    video; compared: methods beside dense; prompt: characters; waiting: jobs in the queue, of all
    users; each: of these, of one user; kept: finished runs of one user, of which the oldest go
    first; body: bytes of an HTTP request; patience: seconds after which a job goes on no more if no
    page asks for it.
    """

    pixels: int = 1280 * 768
    frames: int = 129
    steps: int = 100
    compared: int = 3
    prompt: int = 2000
    waiting: int = 20
    each: int = 4
    kept: int = 60
    body: int = 32 * MEGABYTE
    patience: float = 120.0


@dataclass(frozen=True)
class Studio:
    """Settings of a studio.

    state: folder of the users' files. models: hub ids or folders that whoever runs the studio
    offers besides the bundled model. root: folder below which users may name any model; None for
    nowhere. device, dtype: of all runs, None for the defaults. auth: (user, password) that every
    request has to bring, None for no gate.
    """

    state: Path
    models: tuple[str, ...] = ()
    root: Path | None = None
    device: str | None = None
    auth: tuple[str, str] | None = None
    limits: Limits = field(default_factory=Limits)


def check_limits(request: Request, defaults: dict, limits: Limits, image: bool) -> None:
    """Raises InputError if a request is larger than the limits allow; what it leaves to the model
    is judged by the model's `defaults`, as far as they are known. image: whether it makes images.
    """
    height, width = request.size or (defaults.get("height"), defaults.get("width"))
    most_pixels = limits.pixels * (LARGER if image else 1)
    sparse = sum(choice.method is not None for choice in request.runs)
    asked = (
        ("pixels in a frame", (height or 0) * (width or 0), most_pixels),
        ("frames", request.num_frames or defaults.get("num_frames"), limits.frames),
        ("steps", request.steps or defaults.get("num_inference_steps"), limits.steps),
        ("methods to compare", sparse, limits.compared),
        ("characters in the prompt", len(request.prompt), limits.prompt),
        ("characters in the negative prompt", len(request.negative_prompt or ""), limits.prompt),
    )
    for what, value, most in asked:
        if value is not None and value > most:
            raise InputError(f"This studio allows at most {most:,} {what}, got {value:,}.")
