"""How much of what a prompt of the bundled model's grammar says a clip shows, to the judge."""

import json
from functools import cache

from torch import Tensor

from vdit_sparse.pipelines.mini.training.captions import Spec
from vdit_sparse.pipelines.mini.training.judge import CONFIG, SHIPPED, WEIGHTS
from vdit_sparse.pipelines.mini.training.judge_labels import STATEMENTS, labels, score, statements


def judged_adherence(video: Tensor, spec: Spec) -> float:
    """The share of the caption's statements that the judge sees in the clip, 0 to 1.

    A statement is the place, time, weather or camera, or the object, colour, count or motion of one
    of the things. The judge itself errs: `eval/adherence.py` relates its counts to those on
    renders, over many clips. It knows the bundled model's world only.

    video: RGB `[T, 3, H, W]`, uint8, or float in [0, 1]; spec: what it should show. Raises
    ValueError for no such video.
    """
    return statements(score([_judge().answers(video)], [labels(spec)])).accuracy


def title() -> str:
    """The metric's title with the judge's own accuracy, the same share on held-out renders; as long
    as there is no judge, without."""
    if not (SHIPPED / CONFIG).is_file():
        return "adherence (judge)"
    accuracy = on_renders().get(STATEMENTS)
    known = "not measured" if accuracy is None else f"{accuracy:.3f}"
    return f"adherence (judge; on renders {known})"


def on_renders() -> dict[str, float]:
    """Row of `eval.adherence` -> the shipped judge's accuracy on held-out renders, 0 to 1; empty
    where there is no judge, or nothing was measured."""
    if not (SHIPPED / CONFIG).is_file():
        return {}
    held_out = json.loads((SHIPPED / CONFIG).read_text()).get("held_out", {})
    return held_out.get("renders", {})


def unavailable() -> str | None:
    from vdit_sparse.eval.judge import FOLDER

    if all((FOLDER / name).is_file() for name in (CONFIG, WEIGHTS)):
        return None
    return (
        f"there is no judge in {FOLDER}: train one with "
        "`python -m vdit_sparse.pipelines.mini.training.train judge`."
    )


@cache
def _judge():
    # Imported late: it imports diffusers, which the other metrics do without.
    from vdit_sparse.eval.judge import load_judge

    return load_judge()
