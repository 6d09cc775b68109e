"""Measures the rates that a GPU reaches in the shapes of one model, by the protocol of `gptperf.hardware.workload`.

Only a measurement on a GPU loads torch.
"""

import datetime
import math
from collections.abc import Sequence
from typing import Any, Protocol

from gptperf.config import ModelConfig
from gptperf.errors import DeviceError
from gptperf.formats import percentiles
from gptperf.hardware.ceilings import Ceilings, Machine, Spread
from gptperf.hardware.workload import COPY_BYTES, PROTOCOL, Gemm, Timer, Work, copy_name, workload, workload_key

__all__ = ["Runner", "current_machine", "measure"]

_WINDOW_MS = 300.0  # shorter windows end before the power cap limits the clock: on an H200 their GEMMs read 14% high
_ROUNDS = 5


class Runner(Protocol):
    """Runs workloads on a device."""

    def machine(self) -> Machine:
        """Returns the device that runs the workloads."""

    def prepare(self, work: Work) -> Timer:
        """Makes the operands of a workload, and returns a timer for repeated calls. Several workloads coexist."""


def current_machine() -> Machine:
    """Returns the current CUDA device.

    Raises:
        DeviceError: there is no CUDA device, or torch cannot be imported.
    """
    machine: Machine = _cuda_runner().current_machine()
    return machine


def _cuda_runner() -> Any:
    """Returns the module that runs workloads on a GPU."""
    try:
        from gptperf.hardware import cuda_runner
    except (ImportError, OSError) as error:  # OSError: a shared library of torch does not load
        raise DeviceError(f"the ceilings are measured with torch, which cannot be imported: {error}") from error
    return cuda_runner


def measure(
    model: ModelConfig, batch_size: int, dtype: str, *, runner: Runner | None = None, rounds: int = _ROUNDS
) -> Ceilings:
    """Measures the ceilings of this GPU for one model, which takes about half a minute.

    Args:
        model: the model whose shapes are measured.
        batch_size: sequences of a micro-batch.
        dtype: compute dtype: bfloat16, float16 or float32.
        runner: runs the workloads; default: the current CUDA device.
        rounds: number of windows of each workload.

    Raises:
        ConfigError: the model's GEMMs are not known.
        DeviceError: there is no GPU, or it does not have the dtype.
        OutOfMemoryError: the largest operands do not fit into GPU memory.
    """
    works = workload(model, batch_size)
    if runner is None:
        runner = _cuda_runner().CudaRunner(model, works, dtype)
    machine = runner.machine()
    spreads = {name: _spread(rates) for name, rates in _rates(works, runner, rounds).items()}
    gemms = [work for work in works if isinstance(work, Gemm) and work.count]
    seconds = sum(gemm.count * gemm.amount / spreads[gemm.name].median for gemm in gemms)
    copy, copy_small = (spreads[copy_name(size)].median for size in COPY_BYTES)
    return Ceilings(
        gemm_flop_s=sum(gemm.count * gemm.amount for gemm in gemms) / seconds,
        gemm_square_flop_s=spreads["square"].median,
        attention_forward_flop_s=spreads["attention_forward"].median,
        attention_backward_flop_s=spreads["attention_backward"].median,
        copy_byte_s=copy,
        copy_small_byte_s=copy_small,
        spreads=spreads,
        device=machine.device,
        dtype=dtype,
        key=workload_key(model, batch_size),
        driver=machine.driver,
        versions=machine.versions,
        power_cap_w=machine.power_cap_w,
        power_default_w=machine.power_default_w,
        protocol=PROTOCOL,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _rates(works: Sequence[Work], runner: Runner, rounds: int) -> dict[str, list[float]]:
    """Returns the FLOP/s or byte/s of every workload in every round, without the warm-up round."""
    timers = {work.name: runner.prepare(work) for work in works}
    launches = dict.fromkeys(timers, 1)
    rates: dict[str, list[float]] = {name: [] for name in timers}
    for round_ in range(rounds + 1):
        for work in works:
            call_ms, launches[work.name] = _window(timers[work.name], launches[work.name])
            if round_:
                rates[work.name].append(work.amount / (call_ms / 1e3))
    return rates


def _window(timer: Timer, launches: int) -> tuple[float, int]:
    """Times windows until one is long enough; returns the milliseconds per call, and the launches of that window."""
    elapsed_ms = timer(launches)
    while elapsed_ms < _WINDOW_MS:
        missing = 1.1 * _WINDOW_MS / max(elapsed_ms, 1e-3)
        launches = math.ceil(launches * min(missing, 100))  # the very first call may be slow, because it loads modules
        elapsed_ms = timer(launches)
    return elapsed_ms / launches, launches


def _spread(rates: Sequence[float]) -> Spread:
    p10, median, p90 = percentiles(rates)
    return Spread(median, p10, p90)
