"""What a run did: one entry an attention call, and their summary."""

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Entry:
    """One self-attention call of the last run.

    density: kept share of key blocks, 1.0 for a dense call, None where the method did not say.
    milliseconds: time of the attention alone, None unless asked for.
    """

    expert: str
    branch: str
    step: int
    layer: int
    dense: bool
    density: float | None
    milliseconds: float | None = None


@dataclass(frozen=True)
class Summary:
    """The last run of a pipeline or transformer; printing it gives a table.

    backend: the kernel backend of its sparse calls; reasons: every backend with None if it could
    have run them, else why not.
    """

    method: str
    entries: tuple[Entry, ...] = ()
    backend: str | None = None
    reasons: dict[str, str | None] = field(default_factory=dict)

    @property
    def calls(self) -> int:
        """Self-attention calls of the run."""
        return len(self.entries)

    @property
    def density(self) -> float | None:
        """Mean density over all calls, dense ones counting 1; None before the first run."""
        return _mean(entry.density for entry in self.entries)

    @property
    def sparse_density(self) -> float | None:
        """Mean density over the sparse calls; None if there was none."""
        return _mean(entry.density for entry in self.entries if not entry.dense)

    @property
    def milliseconds(self) -> float | None:
        """Time of all attention calls together; None unless asked for with `timed=True`."""
        times = [entry.milliseconds for entry in self.entries if entry.milliseconds is not None]
        return sum(times) if times else None

    def __str__(self) -> str:
        lines = [f"method: {self.method}"]
        if not self.entries:
            return "\n".join([*lines, "no run yet"])
        if self.backend:
            lines.append(f"backend: {self.backend}")
        lines += [f"  not {name}: {why}" for name, why in self.reasons.items() if why]
        lines.append(
            f"{'step':>4}  {'expert':<13} {'dense':>5} {'sparse':>6} {'density':>7} {'ms':>9}"
        )
        rows = defaultdict(list)
        for entry in self.entries:
            rows[entry.step, entry.expert].append(entry)
        lines += [_row(step, expert, group) for (step, expert), group in sorted(rows.items())]
        lines.append(f"density of the run {_show(self.density, '.3f')}")
        return "\n".join(lines)


class Stopwatch:
    """Times stretches of device work without waiting for it."""

    def start(self, device: torch.device):
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self, started):
        """What `milliseconds` turns into a number once the work is done."""
        if isinstance(started, float):
            return time.perf_counter() - started
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return started, event

    @staticmethod
    def milliseconds(mark) -> float | None:
        if mark is None:
            return None
        if isinstance(mark, float):
            return mark * 1e3
        started, stopped = mark
        stopped.synchronize()
        return started.elapsed_time(stopped)


def settle(entry: Entry) -> Entry:
    """The entry with plain numbers in place of device tensors and event pairs."""
    density = 1.0 if entry.dense else entry.density
    if isinstance(density, Tensor):
        density = float(density)
    milliseconds = Stopwatch.milliseconds(entry.milliseconds)
    place = (entry.expert, entry.branch, entry.step, entry.layer, entry.dense)
    return Entry(*place, density, milliseconds)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _row(step: int, expert: str, group: list[Entry]) -> str:
    dense = sum(entry.dense for entry in group)
    density = _mean(entry.density for entry in group)
    times = [entry.milliseconds for entry in group if entry.milliseconds is not None]
    milliseconds = sum(times) if times else None
    return (
        f"{step:>4}  {expert:<13} {dense:>5} {len(group) - dense:>6} "
        f"{_show(density, '.3f'):>7} {_show(milliseconds, '.1f'):>9}"
    )


def _show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
