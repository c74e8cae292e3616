"""One entry of the table of metrics: what it measures, what it takes, what it needs to run."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

PAIR = ("video", "reference")
ALONE = ("video",)
LATENTS = ("latents", "reference_latents")


class Unavailable(RuntimeError):
    """A metric cannot run here, or a program that it calls failed; the message says why."""


def nothing() -> None:
    """What a metric needs that runs wherever torch does."""


@dataclass(frozen=True)
class Metric:
    """A measure of one video, or of one video against another.

    title: for tables and labels.
    frame_values: `takes` -> one value per frame or pair of frames, float64 `[N]`; None where a
        video has one value only.
    compute: `takes` -> the video's value; None for the mean of `frame_values`.
    takes: the names of its positional arguments, in order (`eval/metrics/__init__.py` says what
        each is).
    higher_is_better: whether a larger value is the better one.
    unit: for labels; empty for a plain number.
    least_frames: how many frames a video must have to have a value.
    needs: returns why it cannot run here, or None; it loads nothing and is cheap to call.
    """

    title: str
    frame_values: Callable[..., Tensor] | None = None
    compute: Callable[..., float] | None = None
    takes: tuple[str, ...] = PAIR
    higher_is_better: bool = True
    unit: str = ""
    least_frames: int = 1
    needs: Callable[[], str | None] = nothing

    def __call__(self, *inputs) -> float:
        """The video's value. Raises Unavailable, or ValueError for inputs it cannot measure."""
        self._check(inputs)
        if self.compute is not None:
            return self.compute(*inputs)
        return self.frame_values(*inputs).mean().item()

    def per_frame(self, *inputs) -> Tensor:
        """Values of the frames, or of pairs of neighbouring frames, float64 `[N]` on the CPU; the
        video's one value, `[1]`, where a frame has none."""
        self._check(inputs)
        if self.frame_values is None:
            return Tensor([self.compute(*inputs)]).double()
        return self.frame_values(*inputs).double().cpu()

    def unavailable(self) -> str | None:
        """Why it cannot run here and what to do about it; None if it can."""
        return self.needs()

    def _check(self, inputs: tuple) -> None:
        if len(inputs) != len(self.takes):
            raise TypeError(
                f"{self.title} takes {', '.join(self.takes)}; got {len(inputs)} inputs."
            )
        if reason := self.unavailable():
            raise Unavailable(f"{self.title} cannot run here: {reason}")
