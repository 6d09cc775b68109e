"""Explains an iteration that takes ten times as long as those before it, as far as the operating system knows why."""

import collections
import contextlib
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gptperf.formats import counted
from gptperf.hardware import gpu_state
from gptperf.hardware.cpu import cgroup_folders, usable_cpus

__all__ = ["SlowSteps", "Usage", "usage"]

_TIMES = 10
_LEAST_MS = 200.0  # below, the scheduler's own delays would look like causes
_WINDOW, _ENOUGH = 50, 5


@dataclass(frozen=True)
class Usage:
    """What the operating system has counted for this process since its start."""

    cpu_s: float
    """CPU time of all its threads."""
    disk_faults: int
    """Pages that had to be read from a disk."""
    throttled: int
    """Periods in which a quota of its cgroups stopped it."""


def usage(cgroups: Iterable[Path]) -> Usage:
    """Returns the counts for this process, which is in these cgroups, so far."""
    counted, throttled = resource.getrusage(resource.RUSAGE_SELF), 0
    for folder in cgroups:
        with contextlib.suppress(OSError, ValueError):
            lines = dict(line.split() for line in Path(folder, "cpu.stat").read_text().splitlines())
            throttled += int(lines.get("nr_throttled", 0))
    return Usage(counted.ru_utime + counted.ru_stime, counted.ru_majflt, throttled)


class SlowSteps:
    """Warns once when an iteration takes ten times the median of the last ones.

    Args:
        say: called with the line.
        gpu: UUID of the GPU, as `gpu_state` takes it, or None on a CPU.
    """

    def __init__(self, say: Callable[[str], object], gpu: str | None = None):
        self._say, self._gpu, self._said = say, gpu, False
        self._times: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._cgroups = list(cgroup_folders())
        self._before = usage(self._cgroups)

    @contextlib.contextmanager
    def watching(self, iteration: int, waited_s: Callable[[], float]) -> Iterator[None]:
        """Measures an iteration on a CPU; on a GPU, where the host runs ahead of the device, `add` has to be called.

        Args:
            iteration: its number.
            waited_s: returns the seconds that this process has waited for data so far.
        """
        waited, begin = waited_s(), time.perf_counter()
        yield
        if self._gpu is None:
            self.add(iteration, 1e3 * (time.perf_counter() - begin), waited_s() - waited)

    def add(self, iteration: int, step_ms: float, waited_s: float = 0.0) -> None:
        """Takes the time of an iteration, of which `waited_s` seconds were spent waiting for data."""
        if self._said:
            return
        now = usage(self._cgroups)
        if len(self._times) >= _ENOUGH:
            median_ms = statistics.median(self._times)
            if step_ms >= max(_TIMES * median_ms, _LEAST_MS):
                self._said = True
                times = f"{step_ms / 1e3:.1f} s, {step_ms / median_ms:.0f} times the median of {median_ms:.0f} ms"
                self._say(f"iteration {iteration} took {times}: {'; '.join(self._known(now, step_ms / 1e3, waited_s))}")
        self._times.append(step_ms)
        self._before = now

    def _known(self, now: Usage, seconds: float, waited_s: float) -> list[str]:
        """Returns what is known about the time since the last iteration."""
        before, cpus, known = self._before, usable_cpus(), []
        if waited_s > 0.1 * seconds:
            known.append(f"{waited_s:.1f} s of it waiting for data")
        if now.throttled > before.throttled:
            periods = counted(now.throttled - before.throttled, "period")
            known.append(f"the CPU quota of its cgroup stopped this process in {periods}")
        if now.disk_faults > before.disk_faults:
            pages = counted(now.disk_faults - before.disk_faults, "page")
            known.append(f"this process read {pages} from disk, so memory may be short")
        known.append(f"load average {os.getloadavg()[0]:.1f} on {counted(cpus, 'usable CPU')}")
        known.append(f"this process had {now.cpu_s - before.cpu_s:.1f} s of CPU time")
        if self._gpu is not None:
            known.append(str(gpu_state(self._gpu)))
        return known
