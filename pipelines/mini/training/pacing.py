"""What both training loops share: schedules by the clock, averaged weights, optimizers, a log."""

import copy
import math
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vdit_sparse.pipelines.mini.training.muon import Muon

_PROCESS_START = time.perf_counter()
_STOP = threading.Event()


def report(*words: object) -> None:
    """Prints one line with the seconds since the process started."""
    print(f"[{time.perf_counter() - _PROCESS_START:6.1f} s]", *words, flush=True)


@contextmanager
def stopped_by_signal() -> Iterator[None]:
    """Within it SIGTERM ends rendering and training early, so that a stage saves what it has; what
    `timeout` sends is SIGTERM. In a thread other than the main one signals stay as they are."""
    _STOP.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: _STOP.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _STOP.clear()


def stopping() -> bool:
    """Whether SIGTERM came: time is up, save and end."""
    return _STOP.is_set()


class Pace:
    """A cosine over elapsed seconds, so that it always ends, however fast the machine is.

    Args:
        seconds: time from now to the end.
        warm_up: steps of linear rise at the beginning.
        peak: largest factor.
        final: factor at the end.
    """

    def __init__(
        self, seconds: float, *, warm_up: int = 40, peak: float = 1.0, final: float = 0.02
    ):
        self.start = time.perf_counter()
        self.seconds = seconds
        self.warm_up, self.peak, self.final = warm_up, peak, final

    def elapsed(self) -> float:
        """Returns the seconds since the start."""
        return time.perf_counter() - self.start

    def fraction(self) -> float:
        """Returns the elapsed share of the time, 0 to 1; 1 once the process is told to stop."""
        if stopping():
            return 1.0
        return min(1.0, self.elapsed() / max(self.seconds, 1e-9))

    def factor(self, step: int) -> float:
        """Returns the learning-rate factor of a 0-based step of this run, at this moment."""
        cosine = 0.5 * (1 + math.cos(math.pi * self.fraction()))
        return min(1.0, (step + 1) / self.warm_up) * (
            self.final + (self.peak - self.final) * cosine
        )


class Average:
    """An exponential moving average of a module's weights, in its own copy of the module."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Moves towards `module`; early steps weigh more, so that the start is forgotten."""
        weight = 1 - min(self.decay, (step + 1) / (step + 20))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), weight)


class TimedAverage:
    """A moving average of a module's weights whose length is in seconds, not in steps.

    Steps of images, clips and long clips take different times, and so do machines; a length in
    seconds averages over the same share of a run on all of them. While the training is young, the
    length is a tenth of its age, so that the start is forgotten.

    Args:
        module: copied; the copy is the attribute `module`.
        seconds: time constant of the exponential decay.
    """

    def __init__(self, module: nn.Module, seconds: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.seconds = seconds
        self.trained = 0.0

    @torch.no_grad()
    def update(self, module: nn.Module, trained: float) -> None:
        """Moves towards `module`, `trained` seconds after the first start of the training.

        A training that is resumed sets the attribute `trained` to where it stopped.
        """
        length = max(min(self.seconds, trained / 10), 1e-9)
        weight = -math.expm1((self.trained - trained) / length)
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), weight)
        self.trained = trained


class Optimizers:
    """Muon for some parameters and AdamW for the others, under one learning-rate factor.

    Args:
        muon: parameters of two or more dimensions.
        adamw: all other parameters.
        rate: Muon's learning rate at factor 1.
        adamw_rate: AdamW's at factor 1.
        muon_decay: decoupled weight decay of the Muon part.
    """

    def __init__(
        self,
        muon: Iterable[nn.Parameter],
        adamw: Iterable[nn.Parameter],
        rate: float = 2e-3,
        *,
        adamw_rate: float = 2e-3,
        muon_decay: float = 0.0,
    ) -> None:
        muon, adamw = list(muon), list(adamw)
        fused = adamw[0].is_cuda
        self.rates = (rate, adamw_rate)
        self.parameters = muon + adamw
        self._parts = (
            Muon(muon, lr=rate, weight_decay=muon_decay),
            torch.optim.AdamW(
                adamw, lr=adamw_rate, betas=(0.9, 0.95), weight_decay=1e-3, fused=fused
            ),
        )

    def step(self, loss: Tensor, factor: float) -> None:
        """Backpropagates, clips the gradient's norm to 1, and updates at `factor` of the rates."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        for part, rate in zip(self._parts, self.rates, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * factor
            part.step()
            part.zero_grad(set_to_none=True)

    def state(self) -> list[dict]:
        """Returns what `load` needs to continue."""
        return [part.state_dict() for part in self._parts]

    def load(self, states: list[dict]) -> None:
        """Restores `state()` of optimizers over the same parameters."""
        for part, state in zip(self._parts, states, strict=True):
            part.load_state_dict(state)


class Meter:
    """Averages the loss on the device and prints it every few seconds, so steps never wait."""

    def __init__(self, name: str, device: torch.device | str, every: float = 6.0) -> None:
        self.name, self.every = name, every
        self.losses: list[float] = []
        self._sum = torch.zeros((), device=device)
        self._steps = self._samples = 0
        self._since = time.perf_counter()

    def add(self, loss: Tensor, samples: int, step: int) -> None:
        """Counts one step; prints and starts over when the interval has passed."""
        self._sum += loss.detach()
        self._steps += 1
        self._samples += samples
        if time.perf_counter() - self._since > self.every:
            self.flush(step)

    def flush(self, step: int) -> None:
        """Prints the mean loss and the speed since the last line, if there was any step."""
        if not self._steps:
            return
        loss = (self._sum / self._steps).item()
        seconds = time.perf_counter() - self._since
        self.losses.append(loss)
        report(f"{self.name} step {step} loss {loss:.4f} {self._samples / seconds:.0f} samples/s")
        self._sum.zero_()
        self._steps = self._samples = 0
        self._since = time.perf_counter()
