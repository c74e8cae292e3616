"""How much of what a prompt of the bundled model's grammar says a clip shows, to the judge."""

from functools import cache

from torch import Tensor

from vdit_sparse.pipelines.mini.training.captions import Spec
from vdit_sparse.pipelines.mini.training.judge_labels import CLIP_KINDS, ITEM_KINDS, labels, score


def judged_adherence(video: Tensor, spec: Spec) -> float:
    """The share of the caption's statements that the judge sees in the clip, 0 to 1.

    A statement is the place, time, weather or camera, or the object, colour, count or motion of one
    of the things. The judge itself errs: `eval/adherence.py` relates its counts to those on
    renders, over many clips. It knows the bundled model's world only.

    video: RGB `[T, 3, H, W]`, uint8, or float in [0, 1]; spec: what it should show. Raises
    ValueError for no such video.
    """
    found = score([_judge().answers(video)], [labels(spec)])
    counted = [found[kind] for kind in (*CLIP_KINDS, *ITEM_KINDS)]
    return sum(each.right for each in counted) / sum(each.asked for each in counted)


def unavailable() -> str | None:
    from vdit_sparse.eval.judge import FOLDER
    from vdit_sparse.pipelines.mini.training.judge import CONFIG, WEIGHTS

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
