"""The process that trains: the clock of its steps, its age, and the signals that ask it to stop."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch

__all__ = ["StepClock", "StopRequest", "process_age_s"]

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


class StopRequest:
    """SIGTERM and Ctrl-C ask the loop to save and stop, SIGUSR1 to save and go on; a second one of the first two ends.

    torchrun passes on the signal that a scheduler may have sent to this process too: there, what comes within seconds
    of the first one is the same request.
    """

    SAME_S = 5.0
    NOTHING, SAVE, STOP = range(3)

    def __init__(self) -> None:
        self.requested = self._save = False
        self._since = 0.0
        self._same_s = self.SAME_S if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._since = True, now
        elif now - self._since >= self._same_s:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _ask_to_save(self, number: int, frame: FrameType | None) -> None:
        self._save = True

    def take(self) -> int:
        """STOP, SAVE or NOTHING; a wish to save is told once."""
        save, self._save = self._save, False
        return self.STOP if self.requested else self.SAVE if save else self.NOTHING

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        handlers = {signal.SIGTERM: self._ask, signal.SIGINT: self._ask, signal.SIGUSR1: self._ask_to_save}
        if signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN:  # whoever started this process has another use for it
            del handlers[signal.SIGUSR1]
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def process_age_s() -> float:
    """Seconds since this process was started, imports included; where there is no /proc, since this module was."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    except OSError:
        return time.monotonic() - _IMPORTED
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
