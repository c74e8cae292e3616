"""What a command `vdit-sparse eval run` is asked for."""

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vdit_sparse.app.calibrate import parse_seeds, read_prompts
from vdit_sparse.app.options import DENSE, InputError, RunChoice, parse_compare
from vdit_sparse.app.request import Request, parse_request
from vdit_sparse.eval.run import Sample, Trial, samples_of, shard
from vdit_sparse.eval.suite import IMAGE, Prompt, Suite, SuiteError, read_suite

# Options of generate that this command has not.
NOT_ASKED = {"method": "dense", "set_": None, "preset": None, "compare": None, "seed": 0}


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """What the caller wants.

    trials: dense first, added where it was not asked for. metrics: None for all that can run.
    part: (index from 0, count) of the samples that this process makes. model: which model is
    loaded, how, and the settings of its call (its prompt is the suite's first). ray: None, or how
    many workers, 0 for as many as there are GPUs.
    """

    suite: Suite
    trials: tuple[Trial, ...]
    seeds: tuple[int, ...]
    out: Path
    model: Request
    metrics: tuple[str, ...] | None = None
    part: tuple[int, int] = (0, 1)
    ray: int | None = None
    keep_frames: bool = False

    @property
    def samples(self) -> Sequence[Sample]:
        """Those of this process, in their order."""
        return shard(samples_of(self.suite, self.seeds), *self.part)

    @property
    def worker(self) -> str:
        """The name of this process among those that write into the folder."""
        index, count = self.part
        return "main" if count == 1 else f"shard-{index + 1}-of-{count}"


def parse_evaluation(words: Mapping) -> EvaluationRequest:
    """The request of a command line, given as option -> text, number, list of texts or None.

    words["torchrun"]: RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them; without one of them it
    was not torchrun. Raises
    InputError for a word that means nothing and a suite that cannot be used.
    """
    suite = parse_suite(words["suite"], words["prompts"], words["image"])
    choices = parse_methods(words["method"])
    model = {**words, **NOT_ASKED, "prompt": suite.prompts[0].text, "overwrite": True}
    model["image"] = _image(suite, words["image"])
    if suite.media == IMAGE:
        if words["num_frames"] not in (None, 1):
            raise InputError(f"The suite {suite.name} is of images: leave --num-frames out.")
        model["num_frames"] = 1
    part, local_rank = parse_part(words["shard"], words["torchrun"])
    if words["ray"] and part[1] > 1:
        raise InputError("--ray shares the samples out itself: leave --shard and torchrun out.")
    if local_rank is not None and model["device"] is None:
        model["device"] = _device_of(local_rank)
    return EvaluationRequest(
        suite=suite,
        trials=trials_of(choices),
        seeds=parse_seeds(words["seeds"]),
        out=Path(words["out"]),
        model=replace(parse_request(model), runs=tuple(choices)),
        metrics=tuple(words["metrics"].split(",")) if words["metrics"] else None,
        part=part,
        ray=words["ray_workers"] or 0 if words["ray"] else None,
        keep_frames=words["keep_frames"],
    )


def parse_suite(source: str, prompts: str | None, image: str | None = None) -> Suite:
    """The suite of that name or file; a `.txt` has a prompt a line. `image` may be the folder of
    the first frames that the suite names."""
    if prompts is not None and not (source.startswith("vbench") or source.endswith(".toml")):
        raise InputError(f"--prompts is for the suites vbench*, but --suite is {source}.")
    try:
        if not source.endswith(".txt"):
            images = Path(image) if image is not None and Path(image).is_dir() else None
            return read_suite(source, None if prompts is None else Path(prompts), images)
        texts = read_prompts(Path(source))
        return Suite(Path(source).stem, tuple(Prompt(text) for text in texts))
    except SuiteError as error:
        raise InputError(str(error)) from error


def parse_methods(texts: Sequence[str]) -> list[RunChoice]:
    """Dense and the methods of `--method NAME:field=value,...`."""
    others = [text for text in texts if text != DENSE]
    return [parse_compare(text, "--method") for text in (DENSE, *others)]


def trials_of(choices: Sequence[RunChoice]) -> tuple[Trial, ...]:
    """The trials of these runs. Raises InputError for two that are the same."""
    trials: dict[str, Trial] = {}
    for choice in choices:
        settings = _settings(choice.method)
        key = f"{choice.name} {settings}"
        if key in trials:
            raise InputError(f"--method: {choice.label!r} and {trials[key].label!r} are the same.")
        trials[key] = Trial(choice.name, choice.label, choice.method, choice.preset, settings)
    return tuple(trials.values())


def _settings(method) -> dict:
    """All fields as plain data; of a calibration file the hash of its content, not its place."""
    if method is None:
        return {}
    fields = dataclasses.asdict(method)
    file = fields.get("calibration")
    if file is not None and Path(file).is_file():
        fields["calibration"] = f"sha256:{hashlib.sha256(Path(file).read_bytes()).hexdigest()}"
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()
    }


def parse_part(text: str | None, torchrun: Mapping) -> tuple[tuple[int, int], int | None]:
    """(index from 0, count) of "2/8" (the second of eight) times torchrun's processes, and the
    local rank, None without torchrun."""
    match = re.fullmatch(r"(\d+)/(\d+)", text or "1/1")
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"--shard must be such as 1/8 to 8/8, got {text!r}.")
    index, count = int(match[1]) - 1, int(match[2])
    if len(torchrun) < 3:
        return (index, count), None
    rank, world, local = (int(torchrun[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return (index * world + rank, count * world), local


def _device_of(local_rank: int) -> str | None:
    return f"cuda:{local_rank}" if torch.cuda.is_available() else None


def _image(suite: Suite, given: str | None) -> str | None:
    """An image of the suite, by which it is seen that the model must take one."""
    images = [prompt.image for prompt in suite.prompts]
    if given is not None and Path(given).is_dir():
        if not any(images):
            raise InputError(f"--image {given} is a folder: --suite {suite.name} names no images.")
        given = None
    if given is None and any(images) and not all(images):
        missing = suite.prompts[images.index(None)].text
        raise InputError(f"The prompt {missing!r} has no image, others have: give --image FILE.")
    return given or (str(images[0]) if images[0] else None)
