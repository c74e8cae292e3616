"""What a run did: one entry an attention call, and their summary."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vdit_sparse.grid import Grid


@dataclass(frozen=True, eq=False)
class Entry:
    """One self-attention call of the last run.

    density: kept share of key blocks, 1.0 for a dense call, None where the method did not say.
    searched: the call passed over q and k once more to find a plan.
    milliseconds: time of the attention with its planning, None unless asked for.
    plans: the parts of it that went into building plans, one for each plan built.
    why: the method's field because of which a dense call was dense.
    error: relative error of the rows that were looked at (`SpotCheck`), None for other calls.
    """

    expert: str
    branch: str
    step: int
    layer: int
    dense: bool
    density: float | None
    searched: bool = False
    milliseconds: float | None = None
    plans: tuple[float, ...] = ()
    why: str | None = None
    error: float | None = None


@dataclass(frozen=True)
class Summary:
    """The last run of a pipeline or transformer; printing it gives a table.

    grid: its tokens; layers: self-attention layers of a transformer; steps: denoising steps of the
    whole run; None where nobody knows, as before the first run.
    backend: the kernel backend of its sparse calls; reasons: every backend with None if it could
    have run them, else why not.
    calibration: the file that plans came from, None for methods that need none.
    """

    method: str
    entries: tuple[Entry, ...] = ()
    backend: str | None = None
    reasons: dict[str, str | None] = field(default_factory=dict)
    grid: Grid | None = None
    layers: int | None = None
    steps: int | None = None
    calibration: str | None = None

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
    def dense_calls(self) -> dict[str, int]:
        """How many calls ran dense, by the method's field that said so."""
        return dict(Counter(entry.why for entry in self.entries if entry.why))

    @property
    def error(self) -> float | None:
        """Largest relative error of the layers that were looked at; None without `check=True`."""
        errors = [entry.error for entry in self.entries if entry.error is not None]
        return max(errors) if errors else None

    @property
    def milliseconds(self) -> float | None:
        """Time of all attention calls together; None unless asked for with `timed=True`."""
        times = [entry.milliseconds for entry in self.entries if entry.milliseconds is not None]
        return sum(times) if times else None

    @property
    def planning_share(self) -> float | None:
        """Share of the sparse calls' time that building plans took, 0 to 1, without the calls that
        searched (`search_milliseconds`); None unless timed."""
        calls = [e for e in self.entries if not e.dense and not e.searched]
        times = [entry.milliseconds for entry in calls if entry.milliseconds is not None]
        return sum(sum(entry.plans) for entry in calls) / sum(times) if times else None

    @property
    def search_milliseconds(self) -> float | None:
        """Time of the calls that searched for their plans; None unless timed."""
        times = [e.milliseconds for e in self.entries if e.searched and e.milliseconds is not None]
        return sum(times) if times or self.milliseconds is not None else None

    def __str__(self) -> str:
        lines = [f"method: {self.method}"]
        if not self.entries:
            return "\n".join([*lines, "no run yet"])
        if self.calibration:
            lines.append(f"calibration: {self.calibration}")
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
        for why, count in self.dense_calls.items():
            lines.append(f"{count} of {self.calls} calls dense by {why}")
        if self.error is not None:
            lines.append(f"largest error of the rows looked at {self.error:.3f}")
        if self.planning_share is not None:
            lines.append(f"planning {self.planning_share:.1%} of the sparse calls' time")
        if self.search_milliseconds:
            lines.append(f"calls that searched {self.search_milliseconds:.1f} ms")
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
    plans = tuple(Stopwatch.milliseconds(mark) for mark in entry.plans)
    return replace(entry, density=density, milliseconds=milliseconds, plans=plans)


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
