"""The protocol by which training steps are timed (`STEP_PROTOCOL`), and the energy that a GPU uses for them.

Torch is imported only by the function that needs a GPU.
"""

import importlib
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gptperf.formats import percentiles

__all__ = ["STEP_PROTOCOL", "EnergyMeter", "Spread", "StepTimes", "Window", "cuda_window", "is_stable", "time_steps"]

WARM_UP = 6
"""Steps that run before the first window."""
WINDOW = 4
"""Steps in a window of the warm-up."""
MOST_WARM_UP = 46
STABLE = 0.01
STEP_PROTOCOL = f"""New random tokens in every step, one micro-batch per optimizer step. Warm-up: the first step, which
compiles, {WARM_UP} more, then windows of {WINDOW} steps until the median of a window is within {STABLE:.0%} of that of
the window before it, at most {MOST_WARM_UP} steps. A CUDA event is recorded after every timed step, and the device is
synchronised once at the end. Figures are the median, the 10th and the 90th percentile. Energy is read from the GPU's
own counter (NVML) before and after the timed steps; clocks and power are read while the last steps run. Peak memory is
the largest that PyTorch had allocated, warm-up included."""

Window = Callable[[int, int], list[float]]
"""A function that runs steps: (number of the first step, number of steps) -> milliseconds of each step. It synchronises
with the device once."""


@dataclass(frozen=True)
class Spread:
    """Median and percentiles of repeated measurements of one time."""

    ms: float
    p10_ms: float
    p90_ms: float

    @classmethod
    def of(cls, times: Sequence[float]) -> "Spread":
        """Summarises times in milliseconds, one per repetition."""
        p10, median, p90 = percentiles(times)
        return cls(median, p10, p90)


@dataclass(frozen=True)
class StepTimes:
    """The result of `time_steps`."""

    ms: list[float]
    """Time of each step, in the order in which they ran."""
    warm_up_steps: int
    stable: bool
    """Whether the warm-up ended because the step times had settled."""
    joules: float | None
    """Energy that the GPU used for the timed steps; None if it is unknown."""
    no_joules: str | None
    """The reason why `joules` is None."""

    @property
    def spread(self) -> Spread:
        """Median and percentiles of the step times."""
        return Spread.of(self.ms)


def is_stable(before: Sequence[float], after: Sequence[float]) -> bool:
    """Returns whether the medians of two windows of step times differ by at most the share `STABLE`."""
    return abs(statistics.median(after) / statistics.median(before) - 1) <= STABLE


def time_steps(window: Window, steps: int, energy: Callable[[], float | None], no_joules: str | None) -> StepTimes:
    """Warms up until the step times settle, then times `steps` steps.

    Args:
        window: runs and times steps; `cuda_window` makes one.
        steps: number of timed steps.
        energy: returns the joules used so far, or None if they are unknown.
        no_joules: the reason why `energy` returns None.
    """
    window(0, WARM_UP)
    done, before, stable = WARM_UP, window(WARM_UP, WINDOW), False
    done += WINDOW
    while not stable and done + WINDOW <= MOST_WARM_UP:
        after = window(done, WINDOW)
        stable, before, done = is_stable(before, after), after, done + WINDOW
    start = energy()
    times = window(done, steps)
    end = energy()
    joules = None if start is None or end is None else end - start
    return StepTimes(times, done, stable, joules, no_joules if joules is None else None)


def cuda_window(run: Callable[[int], object], watch: Callable[[], object] = lambda: None) -> Window:
    """Returns a window that times steps on the current CUDA device.

    Args:
        run: enqueues the step with the given number.
        watch: called when all steps are enqueued, while the device is still busy.
    """
    torch: Any = importlib.import_module("torch")

    def window(first: int, steps: int) -> list[float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        marks[0].record()
        for step, mark in enumerate(marks[1:], first):
            run(step)
            mark.record()
        watch()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]

    return window


class EnergyMeter:
    """Reads the energy counter of one GPU.

    Args:
        uuid: UUID of the card in the driver, "GPU-...".
    """

    def __init__(self, uuid: str):
        self.reason: str | None = None
        """The reason why the counter cannot be read; None if it can be read."""
        self._handle: Any = None
        try:
            self._nvml: Any = importlib.import_module("pynvml")
        except ImportError:
            self.reason = "the package nvidia-ml-py is not installed"
            return
        try:
            self._nvml.nvmlInit()
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
            self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        except self._nvml.NVMLError as error:
            self.reason, self._handle = f"NVML: {error}", None

    def joules(self) -> float | None:
        """Returns the energy used since the driver was loaded, in joules, or None if the counter cannot be read."""
        if self._handle is None:
            return None
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
        except self._nvml.NVMLError as error:
            self.reason, self._handle = f"NVML: {error}", None
            return None
