"""Times work on a GPU: with a cold cache, with CUDA graphs, implementations by turns, and medians as results.

Protocol:

1. Calls rotate over input sets of random numbers. There are at least two sets, together at least four times the size of
   the L2 cache, so that no call finds its inputs there.
2. After two warm-up calls per set, at least 24 calls are captured in one CUDA graph, so that the time of a call does
   not include time of the host. Work that cannot be captured runs in a plain loop, and its figure says so.
3. A window is about 20 ms of replays (at least three) between two CUDA events.
4. A round gives every implementation one window. Windows of different implementations alternate, so that clocks,
   temperature and neighbours are the same for all. The figure is the median over the rounds, with the 10th and the 90th
   percentile.

Everything runs on one side stream, because the default stream cannot be captured and backward runs on the stream of its
forward.

The protocol for training steps is `gptperf.monitor.step_timing.STEP_PROTOCOL`.
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
from gptperf.model.capture import capturing
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
    """Called before each window, outside its time."""
    keep: object = None
    """Reference that keeps the tensors alive whose addresses the graph holds."""

    def window(self, launches: int) -> float:
        """Runs one window, and returns its milliseconds per call."""
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
        prepare: Called before a window, for calls that overwrite their inputs.

    Returns:
        The work; a plain loop if the capture failed.
    """
    for call in itertools.chain(calls, calls):  # may compile, load modules and make handles: a capture allows none
        call()
    torch.cuda.synchronize()
    repeats = math.ceil(GRAPH_CALLS / len(calls))

    def run() -> None:
        for _ in range(repeats):
            for call in calls:
                call()

    graph, method = torch.cuda.CUDAGraph(), "graph"
    try:
        with capturing(graph, torch.cuda.current_stream(), torch.cuda.graph_pool_handle()):
            run()
    except RuntimeError as error:
        torch.cuda.synchronize()
        method = f"loop, not captured: {str(error).partition(chr(10))[0]}"
    launch = graph.replay if method == "graph" else run
    return Work(launch, repeats * len(calls), method, prepare, keep=run)


def copies(moved_bytes: int) -> Work:
    """Returns a copy whose reads and writes add up to `moved_bytes`: the yardstick for an op that moves the same bytes.

    It is the fastest of two `dst.copy_(src)` and one elementwise kernel, each with memory of its own, because on an
    H200 a memcpy is sometimes a third slower than usual, for as long as its buffers exist.
    """
    elements = max(1, moved_bytes // 4)  # 2 bytes per element, read and written
    found = []
    for copy in (Tensor.copy_, Tensor.copy_, lambda target, source: torch.neg(source, out=target)):
        sources = [torch.randn(elements, device="cuda", dtype=torch.bfloat16) for _ in range(input_sets(2 * elements))]
        found.append(capture([partial(copy, torch.empty_like(source), source) for source in sources]))
    return min(found, key=lambda work: min(work.window(MIN_LAUNCHES) for _ in range(3)))


def alternate(works: Mapping[Name, Work], rounds: int, window_ms: float = WINDOW_MS) -> dict[Name, list[float]]:
    """Times several works by turns, with one window of each per round.

    Returns:
        Name -> milliseconds per call, one value per round.
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
    """Measures the host time of a call in microseconds. The device is idle before a window; the host never waits in it.

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
    """Returns the peak memory of a call, without the memory allocated before it and without its results."""
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
    """Describes the device and the software of a measurement.

    Args:
        packages: Packages whose versions are listed besides torch and Triton (None if not installed).

    Returns:
        device ("cpu" without a GPU), versions, python, machine, cores; with a GPU also its driver, memory, L2 cache,
        and `gpu_state`: the current power cap, power, clocks and temperature, as far as the driver reports them.
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
