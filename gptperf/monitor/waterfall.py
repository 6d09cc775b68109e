"""How a training step is timed, and where its time goes: the waterfall of MFU points.

`time_steps` holds the protocol (`STEP_PROTOCOL`), `trace_steps` the profile. `breakdown` and `waterfall` are arithmetic
over the kernels of a trace: every moment of a step belongs to one part, so that the parts add up to the step. Torch is
loaded by the functions that need a GPU only.
"""

import importlib
import itertools
import json
import re
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptperf import flops
from gptperf.config import Config
from gptperf.formats import percentiles

__all__ = ["LOADER_MARK", "PARTS", "STEP_PROTOCOL", "Breakdown", "EnergyMeter", "Kernel", "Spread", "StepTimes"]
__all__ += ["Waterfall", "breakdown", "classify", "cuda_window", "is_stable", "kernels_of", "step_flops", "time_steps"]
__all__ += ["trace_steps", "waits_of", "waterfall"]

WARM_UP = 6
"""Steps before any is looked at."""
WINDOW = 4
MOST_WARM_UP = 46
STABLE = 0.01
STEP_PROTOCOL = f"""Fresh random tokens a step, one optimizer step a micro-batch. Warm-up: the first step, which
compiles, {WARM_UP} more, then windows of {WINDOW} steps until the median of a window is within {STABLE:.0%} of that
before it, at most {MOST_WARM_UP} steps. The timed steps stand between CUDA events, one a step, with one synchronisation
at the end. Figures are the median, the 10th and the 90th percentile. Energy is the GPU's own counter (NVML) before and
after the timed steps; clocks and power are read while the last ones run. Peak memory is what PyTorch had allocated,
warm-up included."""

Interval = tuple[float, float]
Window = Callable[[int, int], list[float]]
"""First step and how many of them -> milliseconds of each, with one synchronisation."""


@dataclass(frozen=True)
class Spread:
    """Times of one call in milliseconds, over the rounds."""

    ms: float
    p10_ms: float
    p90_ms: float

    @classmethod
    def of(cls, times: Sequence[float]) -> "Spread":
        """Median and percentiles of one time a round."""
        p10, median, p90 = percentiles(times)
        return cls(median, p10, p90)


@dataclass(frozen=True)
class StepTimes:
    """What `time_steps` found."""

    ms: list[float]
    """One a step, in their order."""
    warm_up_steps: int
    stable: bool
    """Whether the warm-up ended because the times had settled."""
    joules: float | None
    """Of the GPU over the timed steps."""
    no_joules: str | None
    """Why there are none."""

    @property
    def spread(self) -> Spread:
        """Median and percentiles."""
        return Spread.of(self.ms)


def is_stable(before: Sequence[float], after: Sequence[float]) -> bool:
    """Whether two windows of step times have the same median within `STABLE`."""
    return abs(statistics.median(after) / statistics.median(before) - 1) <= STABLE


def time_steps(window: Window, steps: int, energy: Callable[[], float | None], no_joules: str | None) -> StepTimes:
    """Warm up until the times settle, then time `steps` steps.

    Args:
        window: runs steps; `cuda_window` makes one.
        steps: that are timed.
        energy: joules so far, or None.
        no_joules: why `energy` gives None.
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
    """A window on the current CUDA device.

    Args:
        run: enqueues the step of a number.
        watch: called when all steps are enqueued, while the device still works.
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
    """The energy counter of one GPU. `reason` says why it has none."""

    def __init__(self, uuid: str):
        """
        Args:
            uuid: "GPU-..." as the driver names the card.
        """
        self.reason: str | None = None
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
        """Since the driver was loaded; None where the card does not count."""
        if self._handle is None:
            return None
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3


@dataclass(frozen=True)
class Kernel:
    """One kernel, copy or fill on the device, in microseconds of the trace's clock."""

    name: str
    start_us: float
    duration_us: float
    stream: int = 0

    @property
    def interval(self) -> Interval:
        """Begin and end."""
        return self.start_us, self.start_us + self.duration_us


PARTS = ("gemm", "attention", "memory_bound", "optimizer", "other", "loader", "communication", "host_gaps")
"""What a step's time is made of. A moment in which kernels of several parts run belongs to the first of them: transfers
count only where nothing computes, and host_gaps are the moments in which nothing runs at all."""
_MARKS = (
    ("communication", r"nccl|^_sum_shares|Memcpy PtoP"),
    ("optimizer", r"^_adamw|^triton_.*lerp|multi_tensor_apply|NormTwoOps"),
    ("gemm", r"^triton_tem_.*mm"),
    ("memory_bound", r"^triton_"),
    ("attention", r"sdpa|flash|fmha|cudnn::fusion|attention"),
    ("gemm", r"nvjet|gemm|gemv|cutlass|cublas|xmma|splitKreduce"),
    ("loader", r"Memcpy HtoD|random_from_to"),
    ("memory_bound", r"^_(norm|rope|swiglu|cross_entropy|column_sum|scale)\w*_kernel|at::native|^Memcpy|^Memset|cub::"),
)
"""Part and pattern of a kernel's name; the first match counts. An eager AdamW is made of kernels that others use too,
and counts as memory_bound."""
LOADER_MARK = "gptperf: loader"
"""Name of the `record_function` around the wait for a batch; idle time within it is the loader's."""


def classify(name: str) -> str:
    """The part that a kernel belongs to; "other" for a name that nobody knows."""
    return next((part for part, pattern in _MARKS if re.search(pattern, name)), "other")


def _union(intervals: Sequence[Interval]) -> list[Interval]:
    """The same moments as disjoint intervals in order."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        elif end > begin:
            found.append((begin, end))
    return found


def _without(intervals: Sequence[Interval], covered: Sequence[Interval]) -> list[Interval]:
    """Moments of the first that are not in the second; both disjoint and in order."""
    found, index = [], 0
    for begin, end in intervals:
        while index < len(covered) and covered[index][1] <= begin:
            index += 1
        i = index
        while i < len(covered) and covered[i][0] < end:
            if covered[i][0] > begin:
                found.append((begin, covered[i][0]))
            begin = max(begin, covered[i][1])
            i += 1
        if begin < end:
            found.append((begin, end))
    return found


def _length(intervals: Sequence[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)


@dataclass(frozen=True)
class Breakdown:
    """Milliseconds a step."""

    step_ms: float
    """Of the profiled steps, from the first kernel's start to the last one's end."""
    parts_ms: dict[str, float]
    """By name of `PARTS`; they add up to the step."""
    hidden_communication_ms: float
    """Communication while something computes, which costs nothing here."""
    unknown_ms: dict[str, float]
    """Kernels that no pattern knows, longest first; overlap is not taken off."""


def breakdown(kernels: Sequence[Kernel], steps: int, waits: Sequence[Interval] = ()) -> Breakdown:
    """Give every moment of some steps to one part.

    Args:
        kernels: of all streams of one GPU, in any order.
        steps: that they belong to.
        waits: intervals in which the host waited for a batch, on the same clock.

    Raises:
        ValueError: there is no kernel.
    """
    if not kernels:
        raise ValueError("the trace has no kernel of a GPU")
    by_part: dict[str, list[Interval]] = {part: [] for part in PARTS}
    unknown: dict[str, float] = {}
    for kernel in kernels:
        part = classify(kernel.name)
        by_part[part].append(kernel.interval)
        if part == "other":
            unknown[kernel.name] = unknown.get(kernel.name, 0.0) + kernel.duration_us / 1e3 / steps
    begin, end = min(k.start_us for k in kernels), max(k.interval[1] for k in kernels)
    covered: list[Interval] = []
    spent: dict[str, float] = {}
    for part in PARTS[:-1]:
        moments = _union(by_part[part])
        spent[part] = _length(_without(moments, covered))
        covered = _union([*covered, *moments])
    idle = _without([(begin, end)], covered)
    not_waiting = _without(idle, _union(waits))
    spent["host_gaps"] = _length(not_waiting)
    spent["loader"] += _length(idle) - _length(not_waiting)
    hidden = _length(_union(by_part["communication"])) - spent["communication"]
    return Breakdown(
        step_ms=(end - begin) / 1e3 / steps,
        parts_ms={part: spent[part] / 1e3 / steps for part in PARTS},
        hidden_communication_ms=hidden / 1e3 / steps,
        unknown_ms=dict(sorted(unknown.items(), key=lambda item: -item[1])),
    )


def step_flops(config: Config, num_gpus: int = 1) -> tuple[float, float]:
    """FLOPs of a step on one GPU, strict: those of the matrix products and those of the attention."""
    count = flops.flops_per_token(config.model, "strict")
    sequences = config.tokens_per_iter / num_gpus / count.tokens
    attention = 3 * count.scores
    return float(count.training - attention) * sequences, attention * sequences


@dataclass(frozen=True)
class Waterfall:
    """From 100% down to the MFU, in points of it."""

    lost_points: dict[str, float]
    """By name of `PARTS`. Of gemm and attention it is the time above that of their FLOPs at the peak."""
    mfu_percent: float
    """Of the profiled steps: 100 less all points."""
    timed_mfu_percent: float
    """Of the steps that were timed without a profiler."""

    @property
    def off_points(self) -> float:
        """What the profile is off the timed steps."""
        return self.mfu_percent - self.timed_mfu_percent

    @property
    def closes(self) -> bool:
        """Whether the profiled steps took as long as the timed ones, within one point of MFU."""
        return abs(self.off_points) <= 1


def waterfall(found: Breakdown, flops_of_step: tuple[float, float], peak_flop_s: float, timed_ms: float) -> Waterfall:
    """The points of MFU that each part costs.

    A part that is faster than the peak has a negative cost, which says that the peak is not this card's.

    Args:
        found: of the profiled steps.
        flops_of_step: of `step_flops`.
        peak_flop_s: that the MFU is taken against.
        timed_ms: a step without a profiler.
    """
    ideal_ms = [1e3 * count / peak_flop_s for count in flops_of_step]
    costs = dict(found.parts_ms)
    costs["gemm"] -= ideal_ms[0]
    costs["attention"] -= ideal_ms[1]
    lost = {part: 100 * ms / found.step_ms for part, ms in costs.items()}
    return Waterfall(lost, 100 - sum(lost.values()), 100 * sum(ideal_ms) / timed_ms)


def trace_steps(
    run: Callable[[int], object], first: int, steps: int, *, warm_up: int = 0, host: bool = False
) -> dict[str, Any]:
    """Run steps under PyTorch's profiler.

    Args:
        run: enqueues the step of a number.
        first: number of the first step.
        steps: how many are recorded.
        warm_up: steps before them: while the profiler starts, the device rests and would be faster for a second.
        host: record the host too, for `LOADER_MARK`; that slows the host down.

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
            if warm_up and step + 1 < first + warm_up + steps:  # the last one would end the trace
                profile.step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        trace: dict[str, Any] = json.loads(path.read_text())
    return trace


def _events(trace: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [event for event in trace.get("traceEvents", []) if event.get("ph") == "X"]


def kernels_of(trace: Mapping[str, Any]) -> list[Kernel]:
    """Kernels, copies and fills of a trace."""
    on_device = ("kernel", "gpu_memcpy", "gpu_memset")
    return [
        Kernel(event["name"], float(event["ts"]), float(event["dur"]), int(event.get("args", {}).get("stream", 0)))
        for event in _events(trace)
        if event.get("cat") in on_device
    ]


def waits_of(trace: Mapping[str, Any]) -> list[Interval]:
    """When the host was within `LOADER_MARK`."""
    marks = [event for event in _events(trace) if event.get("name") == LOADER_MARK]
    return [(float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in marks if e.get("cat") == "user_annotation"]
