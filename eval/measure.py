"""All figures of one clip: the metrics that can run here, and adherence where it is known what the
clip should show."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vdit_sparse.eval.adherence import adherence, checked
from vdit_sparse.eval.judge import Judge, load_judge
from vdit_sparse.eval.metrics import METRICS, Unavailable
from vdit_sparse.eval.store import Made
from vdit_sparse.eval.suite import IMAGE, Prompt, Suite

# What a sample has for a metric to take.
_GIVEN = {"video", "reference", "prompt", "spec", "latents", "reference_latents"}


@dataclass(frozen=True)
class Chosen:
    """names: of the metrics that are measured; left_out: the others, and why not; judge: of the
    bundled model's clips, where the suite asks for it and its weights are there."""

    names: tuple[str, ...]
    left_out: Mapping[str, str]
    judge: Judge | None = None


def choose(names: Sequence[str] | None, suite: Suite) -> Chosen:
    """The metrics of these names; by default all that a sample of the suite has the inputs for and
    that can run here. Raises ValueError for one that there is not, or that cannot run here."""
    unknown = [name for name in names or () if name not in METRICS]
    if unknown:
        raise ValueError(f"There is no metric {unknown[0]!r}; there are: {', '.join(METRICS)}.")
    reasons = {name: _reason(name, suite) for name in names or METRICS}
    left_out = {name: reason for name, reason in reasons.items() if reason}
    if names and left_out:
        name, reason = next(iter(left_out.items()))
        raise ValueError(f"The metric {name} cannot be measured: {reason}")
    judge = None
    if any(prompt.shows for prompt in suite.prompts):
        try:
            judge = load_judge()
        except FileNotFoundError as error:
            left_out["the judge's adherence"] = str(error)
    measured = tuple(name for name, reason in reasons.items() if not reason)
    return Chosen(measured, left_out, judge)


@dataclass(frozen=True)
class Measure:
    """Callable as `eval.run.Measure`; the frames are measured on `device`."""

    chosen: Chosen
    device: torch.device

    def __call__(self, made: Made, reference: Made | None, prompt: Prompt) -> dict:
        """The parts of a row:

        metrics: name -> value; those that compare are not there for the dense run.
        unmeasured: name -> why this clip has no such value.
        adherence: row of `eval.adherence` -> [right, asked], where anything was asked.
        """
        given = {"prompt": prompt.text, "spec": prompt.shows, **self._tensors(made, "video", "")}
        if reference is not None:
            given |= self._tensors(reference, "reference", "reference_")
        values, unmeasured = {}, {}
        for name in self.chosen.names:
            metric = METRICS[name]
            if any(given.get(each) is None for each in metric.takes):
                continue
            try:
                value = metric(*(given[each] for each in metric.takes))
            except (ValueError, Unavailable) as error:
                unmeasured[name] = str(error)
                continue
            if math.isfinite(value):
                values[name] = value
            else:
                unmeasured[name] = f"the value is {value}"
        return {
            "metrics": values,
            "unmeasured": unmeasured,
            "adherence": self._adherence(made.frames, prompt),
        }

    def _tensors(self, made: Made, name: str, before: str) -> dict[str, Tensor]:
        found = {name: made.frames.to(self.device)}
        if made.latents is not None:
            latents = made.latents.to(self.device)
            # Packed tokens [tokens, C] are one frame of one row.
            latents = latents if latents.ndim == 4 else latents.flatten(0, -2).T[:, None, None]
            found[f"{before}latents"] = latents
        return found

    def _adherence(self, frames: Tensor, prompt: Prompt) -> dict:
        if prompt.shows is None:
            return {}
        judge = self.chosen.judge
        about = ([frames], [prompt.shows])
        found = checked(*about) if judge is None else adherence(judge, *about)
        return {row: [score.right, score.asked] for row, score in found.items() if score.asked}


def _reason(name: str, suite: Suite) -> str | None:
    """Why a metric cannot be measured on samples of a suite; None if it can."""
    metric = METRICS[name]
    missing = set(metric.takes) - _GIVEN
    if missing:
        return f"{', '.join(sorted(missing))} of a sample are not kept."
    if "spec" in metric.takes and not any(prompt.shows for prompt in suite.prompts):
        return f"the suite {suite.name} does not say what its prompts show."
    if suite.media == IMAGE and metric.least_frames > 1:
        return f"it needs {metric.least_frames} frames, and an image is one."
    return metric.unavailable()
