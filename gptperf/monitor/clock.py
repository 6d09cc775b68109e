"""Measures the wall time of training steps, without evaluations and saves between them, and the age of this process."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["Lap", "StepClock", "process_age_s"]

_IMPORTED = time.monotonic()


class Lap(NamedTuple):
    """The time since the last log line."""

    seconds: float
    """Time of the steps, without pauses."""
    steps: int
    """Number of steps in that time. It is 0 after the first step of a process, which runs while the clock is paused."""
    paused_s: float
    """Length of the last pause."""

    @property
    def step_ms(self) -> float:
        """Mean time of a step; if there is no step, the length of the last pause."""
        return 1e3 * (self.seconds / self.steps if self.steps else self.paused_s)


class StepClock:
    """Measures the wall time of steps, without the time spent inside `paused`.

    Args:
        device: device on which the steps run.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.elapsed_s, self.steps, self.paused_s = 0.0, 0, 0.0
        self.since = time.perf_counter()

    def _synchronize(self) -> None:
        """Waits for the device, so that the time of enqueued steps counts before a pause and not within it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the body from the time of steps."""
        self._synchronize()
        begin = time.perf_counter()
        self.elapsed_s += begin - self.since
        yield
        self._synchronize()
        self.since = time.perf_counter()
        self.paused_s = self.since - begin

    def lap(self) -> Lap:
        """Returns the time since the last lap, and starts the next one. The device must be idle."""
        now = time.perf_counter()
        lap = Lap(self.elapsed_s + now - self.since, self.steps, self.paused_s)
        self.elapsed_s, self.steps, self.since = 0.0, 0, now
        return lap


def process_age_s() -> float:
    """Returns the seconds since this process started, imports included; without /proc, since this module's import."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return time.monotonic() - _IMPORTED
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
