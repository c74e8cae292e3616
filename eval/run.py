"""A suite through several methods, sample by sample: whatever ends it, the next start goes on.

A sample is one prompt, seed and method. Its key is a hash of the protocol and of all that is its
own, so that a finished sample is known by its row, and settings that differ never share one.
"""

import errno
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from torch import Tensor

from vdit_sparse.eval.files import sample_name, stems
from vdit_sparse.eval.store import Made, Store, content_hash, digest, read_rows
from vdit_sparse.eval.suite import IMAGE, Prompt, Suite

SCHEMA = 1
MOST_FAILURES = 5  # in a row, without a success between
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


class Stopped(Exception):
    """The evaluation cannot go on; finished samples are kept. One line says why."""


@dataclass(frozen=True)
class Trial:
    """One of the methods that are compared.

    name: "dense" or a name in `METHODS`; label: with the settings that are not the defaults;
    method: None for dense; settings: all fields, and of a calibration its content's hash.
    """

    name: str
    label: str
    method: object = None
    preset: str | None = None
    settings: Mapping = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """A prompt with one seed; `stem` is the prompt as a file name."""

    prompt: Prompt
    stem: str
    seed: int


Make = Callable[[Prompt, int, Trial], Made]
# (what was made, that of dense attention or None, prompt) -> names of the row and their values
Measure = Callable[[Made, Made | None, Prompt], dict]


def samples_of(suite: Suite, seeds: Sequence[int]) -> list[Sample]:
    """All prompts with the first seed, then with the second, ..."""
    named = list(zip(suite.prompts, stems([each.text for each in suite.prompts]), strict=True))
    return [Sample(prompt, stem, seed) for seed in seeds for prompt, stem in named]


def shard(samples: Sequence[Sample], index: int, count: int) -> Sequence[Sample]:
    """Part `index` of `count`, counted from 0. A sample's methods stay together, for all need the
    frames of its dense run."""
    return samples[index::count]


@dataclass
class Evaluation:
    """Makes, measures and writes samples. The first of `trials` is dense, the others' reference.

    protocol: what all samples have in common; make, measure: see above; write: a path and frames,
    to a whole file or none. keep_frames: leave all frames in the folder. tell: called with the
    sample, the trial and what happens: "made", "row" or an error.
    """

    store: Store
    protocol: Mapping
    suite: Suite
    trials: Sequence[Trial]
    make: Make
    measure: Measure
    write: Callable[[Path, Tensor], None]
    keep_frames: bool = False
    facts: Mapping = field(default_factory=dict)
    tell: Callable[[Sample, Trial, str], None] = lambda *_: None
    failed: int = 0
    _failed_in_a_row: int = 0

    def __post_init__(self):
        first, *others = self.trials
        if first.method is not None or any(trial.method is None for trial in others):
            raise ValueError("Expected dense as the first trial, and once.")
        self._protocol = digest(self.protocol)
        self.reload()

    def reload(self) -> None:
        """Looks at what all workers have finished so far."""
        self.rows = {row["key"]: row for row in read_rows(self.store.folder)}

    def do(self, sample: Sample) -> None:
        """Makes whatever is missing of a sample.

        What goes wrong costs that sample and is written down. Raises Stopped where the disk is
        full, and after five failures without a success between them.
        """
        dense, *others = self.trials
        missing = [trial for trial in others if self.key(sample, trial) not in self.rows]
        if missing or self.key(sample, dense) not in self.rows:
            reference = self._try(sample, dense, None)
            if reference is None:
                return
            for trial in missing:
                self._try(sample, trial, reference)
        if not self.keep_frames and self.finished(sample):
            for trial in self.trials:
                self.store.forget(self.key(sample, trial))

    def finished(self, sample: Sample) -> bool:
        """Whether each trial of a sample has its row."""
        return all(self.key(sample, trial) in self.rows for trial in self.trials)

    def key(self, sample: Sample, trial: Trial) -> str:
        prompt = sample.prompt
        own = [prompt.text, prompt.negative, sample.seed, trial.name, dict(trial.settings)]
        return content_hash([SCHEMA, self._protocol, own])

    def _try(self, sample: Sample, trial: Trial, reference: Made | None) -> Made | None:
        """What was made, or None for a failure, which is written down."""
        try:
            made = self._one(sample, trial, reference)
        except Exception as error:
            self._stop_at_a_full_disk(error)
            said = " ".join(f"{type(error).__name__}: {error}".split())
            self._fail(sample, trial, said)
            if self._failed_in_a_row >= MOST_FAILURES:
                raise Stopped(
                    f"{MOST_FAILURES} samples in a row failed, the last with {said}. Finished "
                    f"samples are kept; all errors are in {self.store.folder / 'failures'}."
                ) from error
            return None
        self._failed_in_a_row = 0
        return made

    def _one(self, sample: Sample, trial: Trial, reference: Made | None) -> Made:
        key = self.key(sample, trial)
        made = self.store.kept(key)
        if made is None:
            # A dense run that has its row is made again for its frames: another method came later.
            made = self.make(sample.prompt, sample.seed, trial)
            self.store.keep(key, made)
            self.tell(sample, trial, "made")
        if key not in self.rows:
            file = self._file(sample, trial)
            path = self.store.folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            self.write(path, made.frames)
            row = self._row(sample, trial, made, reference)
            self.store.append({**row, "file": file})
            self.rows[key] = row
            self.tell(sample, trial, "row")
        if reference is not None and not self.keep_frames:
            self.store.forget(key)
        return made

    def _file(self, sample: Sample, trial: Trial) -> str:
        suffix = ".png" if self.suite.media == IMAGE else ".mp4"
        (folder,) = stems([trial.label.replace(" ", "-")])
        return f"videos/{folder}/{sample_name(sample.stem, sample.seed, suffix)}"

    def _row(self, sample: Sample, trial: Trial, made: Made, reference: Made | None) -> dict:
        compared = {}
        if reference is not None:
            dense = self.rows[self.key(sample, self.trials[0])]
            ratio = dense["denoise_seconds"] / made.facts["denoise_seconds"]
            compared = {"speedup": ratio, "reference_sha256": _sha256(reference.frames)}
        return {
            "schema": SCHEMA,
            "key": self.key(sample, trial),
            "protocol": self._protocol,
            "method": {
                "name": trial.name,
                "label": trial.label,
                "preset": trial.preset,
                "settings": dict(trial.settings),
            },
            "prompt": sample.prompt.text,
            "negative_prompt": sample.prompt.negative,
            "seed": sample.seed,
            "frames": list(made.frames.shape),
            **made.facts,
            "frames_sha256": _sha256(made.frames),
            "speedup": None,
            **compared,
            **self.measure(made, reference, sample.prompt),
            **self._written(),
        }

    def _fail(self, sample: Sample, trial: Trial, error: str) -> None:
        self.failed += 1
        self._failed_in_a_row += 1
        about = {"method": trial.label, "prompt": sample.prompt.text, "seed": sample.seed}
        key = self.key(sample, trial)
        try:
            self.store.fail({"key": key, **about, "error": error, **self._written()})
        except OSError as full:
            # What went wrong before may have been the same, as ffmpeg says it.
            self._stop_at_a_full_disk(full)
            raise
        self.tell(sample, trial, error)

    def _stop_at_a_full_disk(self, error: Exception) -> None:
        if isinstance(error, OSError) and error.errno in _DISK:
            raise Stopped(
                f"Cannot write to {self.store.folder} ({error.strerror}): make room, and start "
                "again; finished samples are kept."
            ) from error

    def _written(self) -> dict:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return {"worker": self.store.worker, "written": now, **self.facts}


def _sha256(frames: Tensor) -> str:
    return hashlib.sha256(frames.contiguous().numpy().tobytes()).hexdigest()
