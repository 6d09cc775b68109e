"""Records traces of training steps with PyTorch's profiler, and reads the kernels and the waits for batches from them.

Torch is imported only by the function that records.
"""

import importlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["LOADER_MARK", "Interval", "Kernel", "kernels_of", "trace_steps", "waits_of"]

Interval = tuple[float, float]
"""Start and end in microseconds of the trace's clock."""
LOADER_MARK = "gptperf: loader"
"""Name of the `record_function` around the wait for a batch; the device's idle time within it is due to the loader."""


@dataclass(frozen=True)
class Kernel:
    """A kernel, copy or fill on the device; times are in microseconds of the trace's clock."""

    name: str
    start_us: float
    duration_us: float
    stream: int = 0

    @property
    def interval(self) -> Interval:
        """Start and end."""
        return self.start_us, self.start_us + self.duration_us


def trace_steps(
    run: Callable[[int], object], first: int, steps: int, *, warm_up: int = 0, host: bool = False
) -> dict[str, Any]:
    """Runs steps under PyTorch's profiler.

    Args:
        run: enqueues the step with the given number.
        first: number of the first step.
        steps: number of recorded steps.
        warm_up: number of steps that run before the recorded ones. The device is idle while the profiler starts, and
            for about a second after that, steps are faster than usual.
        host: whether to record the host too, which `LOADER_MARK` needs; this slows the host down.

    Returns:
        The trace as PyTorch exports it.
    """
    torch: Any = importlib.import_module("torch")
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(
        activities=[kinds.CUDA, kinds.CPU] if host else [kinds.CUDA],
        schedule=torch.profiler.schedule(wait=0, warmup=warm_up, active=steps, repeat=1) if warm_up else None,
        acc_events=True,
    ) as profile:
        for step in range(first, first + warm_up + steps):
            run(step)
            if step + 1 in (first + warm_up, first + warm_up + steps) and torch.cuda.is_available():
                torch.cuda.synchronize()
            if warm_up and step + 1 < first + warm_up + steps:  # a call after the last step would end the trace
                profile.step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        trace: dict[str, Any] = json.loads(path.read_text())
    return trace


def _events(trace: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the events of a trace that have a duration."""
    return [event for event in trace.get("traceEvents", []) if event.get("ph") == "X"]


def kernels_of(trace: Mapping[str, Any]) -> list[Kernel]:
    """Returns the kernels, copies and fills of a trace."""
    on_device = ("kernel", "gpu_memcpy", "gpu_memset")
    return [
        Kernel(event["name"], float(event["ts"]), float(event["dur"]), int(event.get("args", {}).get("stream", 0)))
        for event in _events(trace)
        if event.get("cat") in on_device
    ]


def waits_of(trace: Mapping[str, Any]) -> list[Interval]:
    """Returns the intervals in which the host was within `LOADER_MARK`."""
    marks = [event for event in _events(trace) if event.get("name") == LOADER_MARK]
    return [(float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in marks if e.get("cat") == "user_annotation"]
