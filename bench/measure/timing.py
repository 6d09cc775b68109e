"""Times work on a GPU: cold cache, CUDA graphs, implementations in turn, medians.

Protocol:

1. Calls rotate over input sets of random numbers, at least two and together at least four times the L2 cache, so that
   no call finds its inputs there.
2. After two warm-up calls a set, the calls are captured in one CUDA graph of at least 24 of them: a replay costs the
   host no time that a call would show. Work that cannot be captured runs in a plain loop, and its figure says so.
3. A window is about 20 ms of replays (three at least) between two CUDA events.
4. A round gives every implementation one window. Rounds follow each other, so that clocks, temperature and neighbours
   are the same for all. The figure is the median over the rounds, with the 10th and 90th percentile.

Everything runs on one side stream: the default one cannot be captured, and a backward runs on its forward's stream.

A training step has a protocol of its own, `gptperf.monitor.step_timing.STEP_PROTOCOL`, which the profile of a run uses
too.
"""

import itertools
import math
import os
import platform
import statistics
import timeit
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any, TypeVar

import torch
from torch import Tensor

from gptperf.hardware import gpu_state
from gptperf.monitor.step_timing import Spread

__all__ = ["Call", "Spread", "Work", "alternate", "capture", "copies", "device_uuid", "environment", "extra_bytes"]
__all__ += ["host_us", "input_sets", "side_stream"]

Call = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)

L2_TIMES = 4
GRAPH_CALLS = 24  # 1 ms of the smallest op: the 5 us between two replays are half a percent
WINDOW_MS = 20.0
MIN_LAUNCHES = 3


@dataclass(frozen=True)
class Work:
    """Calls that are launched together and timed as one."""

    launch: Call
    """Enqueues `calls` calls on the current stream."""
    calls: int = 1
    method: str = "loop"
    """"graph", or "loop" with the reason."""
    prepare: Call | None = None
    """Runs before a window, outside its time."""
    keep: object = None
    """Keeps the tensors alive whose addresses the graph holds."""

    def window(self, launches: int) -> float:
        """Returns milliseconds a call over one window."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.prepare is not None:
            self.prepare()
        start.record()
        for _ in range(launches):
            self.launch()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / (launches * self.calls)


@contextmanager
def side_stream() -> Iterator[None]:
    """Runs the body on a stream that can be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def input_sets(set_bytes: int) -> int:
    """Returns how many input sets of `set_bytes` bytes keep the L2 cache cold."""
    l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(2, math.ceil(L2_TIMES * l2_bytes / set_bytes))


def capture(calls: Sequence[Call], prepare: Call | None = None) -> Work:
    """Warms up, then captures a graph of at least `GRAPH_CALLS` calls.

    Args:
        calls: One call for each input set; it launches work on the current stream and can be repeated.
        prepare: Runs before a window, for calls that overwrite what they read.

    Returns:
        The work, as a plain loop where the capture failed.
    """
    for call in itertools.chain(calls, calls):  # compiles, loads modules, makes handles: a capture allows none of these
        call()
    torch.cuda.synchronize()
    repeats = math.ceil(GRAPH_CALLS / len(calls))

    def run() -> None:
        for _ in range(repeats):
            for call in calls:
                call()

    graph, method = torch.cuda.CUDAGraph(), "graph"
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            run()
    except RuntimeError as error:
        torch.cuda.synchronize()
        method = f"loop, not captured: {str(error).partition(chr(10))[0]}"
    launch = graph.replay if method == "graph" else run
    return Work(launch, repeats * len(calls), method, prepare, keep=run)


def copies(moved_bytes: int) -> Work:
    """Returns a copy whose reads and writes add up to `moved_bytes`: the yardstick for an op that moves as much.

    It is the fastest of two `dst.copy_(src)` and one elementwise kernel, each with memory of its own: on an H200 a
    memcpy is sometimes a third slower than usual, for as long as its buffers live.
    """
    elements = max(1, moved_bytes // 4)  # 2 bytes an element, read and written
    found = []
    for copy in (Tensor.copy_, Tensor.copy_, lambda target, source: torch.neg(source, out=target)):
        sources = [torch.randn(elements, device="cuda", dtype=torch.bfloat16) for _ in range(input_sets(2 * elements))]
        found.append(capture([partial(copy, torch.empty_like(source), source) for source in sources]))
    return min(found, key=lambda work: min(work.window(MIN_LAUNCHES) for _ in range(3)))


def alternate(works: Mapping[Name, Work], rounds: int, window_ms: float = WINDOW_MS) -> dict[Name, list[float]]:
    """Times every work with one window a round.

    Returns:
        Name -> milliseconds a call, one for each round.
    """
    launches = {}
    for name, work in works.items():
        work.window(1)  # the first window may load modules
        launch_ms = work.window(MIN_LAUNCHES) * work.calls
        launches[name] = max(MIN_LAUNCHES, math.ceil(window_ms / launch_ms))
    times: dict[Name, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(work.window(launches[name]))
    return times


def host_us(call: Call, calls: int = 300, windows: int = 5) -> dict[str, float]:
    """Measures the host time of a call in microseconds; the queue is empty before a window, and nothing waits in it.

    Returns:
        us of the median window, low_us of the fastest and high_us of the slowest.
    """
    timeit.timeit(call, number=20)
    times = []
    for _ in range(windows):
        torch.cuda.synchronize()
        times.append(timeit.timeit(call, number=calls) / calls * 1e6)
    torch.cuda.synchronize()
    return {"us": statistics.median(times), "low_us": min(times), "high_us": max(times)}


def extra_bytes(call: Callable[[], Sequence[Tensor]]) -> int:
    """Returns the peak memory of a call, without what was allocated before it and without its results."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results)


def device_uuid() -> str:
    """Returns the UUID of the current CUDA device, by which its driver and NVML know it."""
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


def environment(packages: Sequence[str] = ()) -> dict[str, Any]:
    """Describes the device and the software that make the figures.

    Args:
        packages: Packages whose versions are listed beside torch and Triton (None: not installed).

    Returns:
        device ("cpu" without a GPU), versions, python, machine, cores; with a GPU its driver, memory, L2 cache, and
        `gpu_state`: power cap, power, clocks and temperature now, where the driver tells them.
    """
    versions: dict[str, str | None] = {}
    for package in ("torch", "triton", *packages):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    versions["torch"] = torch.__version__
    host = {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()}
    if not torch.cuda.is_available():
        return {"device": "cpu", "versions": versions, **host}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    state = gpu_state(device_uuid())
    cudnn = torch.backends.cudnn.version()
    return {
        "device": properties.name,
        "driver": state.driver,
        "memory_gb": properties.total_memory / 1e9,
        "l2_bytes": properties.L2_cache_size,
        "multiprocessors": properties.multi_processor_count,
        "versions": {**versions, "cuda": torch.version.cuda, "cudnn": cudnn and str(cudnn)},
        "gpu_state": state.as_dict(),
        **host,
    }
