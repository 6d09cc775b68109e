"""Time: of steps, without what is no step, and of this process."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch

__all__ = ["StepClock", "process_age_s"]

_IMPORTED = time.monotonic()


class StepClock:
    """Wall time of steps, without what happens in `paused`."""

    def __init__(self, device: torch.device):
        self.device = device
        self.elapsed_s, self.steps, self.paused_s = 0.0, 0, 0.0
        self.since = time.perf_counter()

    def _synchronize(self) -> None:
        """Wait for the device, so that the clock means something."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do something that is not a step."""
        self._synchronize()
        begin = time.perf_counter()
        self.elapsed_s += begin - self.since
        yield
        self._synchronize()
        self.since = time.perf_counter()
        self.paused_s = self.since - begin

    def lap(self) -> tuple[float, int]:
        """Seconds and steps since the last lap; the device has to be idle."""
        now = time.perf_counter()
        seconds, steps = self.elapsed_s + now - self.since, self.steps
        self.elapsed_s, self.steps, self.since = 0.0, 0, now
        return seconds, steps


def process_age_s() -> float:
    """Seconds since this process was started, imports included; where there is no /proc, since this module was."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return time.monotonic() - _IMPORTED
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
