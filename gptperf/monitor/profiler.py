"""Profiles a few iterations of a run: a trace for Perfetto, the waterfall of MFU points, and the longest kernels."""

import contextlib
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gptperf import flops
from gptperf.config import Config
from gptperf.files import replacing
from gptperf.hardware import Peak
from gptperf.monitor.clock import StepClock
from gptperf.monitor.events import Profile
from gptperf.monitor.trace import Kernel, kernels_of, waits_of
from gptperf.monitor.waterfall import breakdown, classify, step_flops, waterfall

__all__ = ["StepProfiler"]

_LONGEST = 25  # kernels in the log


class StepProfiler:
    """Records the iterations START to STOP of the key `profile` (START:STOP), on the main rank.

    Args:
        config: configuration of the run.
        num_gpus: GPUs of the job.
        peak: peak of one GPU, for the waterfall; None if it is not known.
        enabled: whether this rank records. The main rank does; other ranks only know which iterations are recorded.
    """

    def __init__(self, config: Config, num_gpus: int, peak: Peak | None, enabled: bool):
        self.config, self.num_gpus, self.peak, self.enabled = config, num_gpus, peak, enabled
        text = config.log.profile
        self.first, self.last = (int(number) for number in text.split(":")) if text else (0, -1)
        self._profile: Any = None
        self._pairs: list[torch.Tensor] = []
        self._pause = contextlib.ExitStack()

    def covers(self, iteration: int) -> bool:
        """Returns whether an iteration is recorded. Its time is then not comparable with others."""
        return self.first <= iteration <= self.last

    def before(self, iteration: int, clock: StepClock) -> None:
        """Starts to record before the first recorded iteration, and pauses the clock until the last one has ended."""
        if self.enabled and self._profile is None:
            kinds = torch.profiler.ProfilerActivity
            on_gpu = torch.cuda.is_available() and self.config.system.device != "cpu"
            self._pause.enter_context(clock.paused())
            self._first, self._pairs = iteration, []
            self._profile = torch.profiler.profile(activities=[kinds.CPU, *([kinds.CUDA] if on_gpu else [])])
            self._profile.__enter__()

    def after(self, iteration: int, pairs: torch.Tensor | None = None) -> Profile | None:
        """Returns the profile when the last recorded iteration has been enqueued; after other iterations, None.

        Args:
            iteration: the iteration.
            pairs: `StepResult.pairs` of the iteration.
        """
        if self._profile is None:
            return None
        self._pairs += [] if pairs is None else [pairs]
        if iteration < self.last:
            return None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._profile.__exit__(None, None, None)
        profile, self._profile = self._profile, None
        path = Path(self.config.train.out_dir) / f"trace_{self._first}-{iteration}.json.gz"
        trace = _export(profile, path)
        steps = iteration - self._first + 1
        found: Profile = {"iter": iteration, "trace": str(path), "steps": steps, "waterfall": None, "mfu_percent": None}
        self._pause.close()
        kernels = kernels_of(trace)
        if not kernels:
            return found
        parts = breakdown(kernels, steps, waits_of(trace))
        found |= {"step_ms": parts.step_ms, "parts_ms": parts.parts_ms, "kernels": _longest(kernels, steps)}
        if self.peak is not None and flops.uncountable_flops(self.config.model) is None:
            mean = sum(int(pairs) for pairs in self._pairs) / steps or None
            work = step_flops(self.config, self.num_gpus, mean, self.peak)
            fall = waterfall(parts, work, self.peak.flop_s, parts.step_ms)
            found |= {"waterfall": fall.lost_points, "mfu_percent": fall.mfu_percent, "convention": "strict"}
            if self.config.system.matmul_dtype == "fp8":
                found["convention"] = "strict, each matmul of its own peak"
            found |= self.peak.record()  # type: ignore[typeddict-item]
        return found


def _export(profile: Any, path: Path) -> dict[str, Any]:
    """Writes the compressed trace to `path`, under a temporary name until it is complete, and returns its content."""
    with replacing(path) as temporary:
        profile.export_chrome_trace(str(temporary))
        text = temporary.read_bytes()
        temporary.write_bytes(gzip.compress(text, 5))
    trace: dict[str, Any] = json.loads(text)
    return trace


def _longest(kernels: Sequence[Kernel], steps: int) -> list[dict[str, Any]]:
    """Returns the kernels that take most time: name, part, and milliseconds and calls per step."""
    totals: dict[str, list[float]] = {}
    for kernel in kernels:
        totals.setdefault(kernel.name, []).append(kernel.duration_us / 1e3)
    ranked = sorted(totals.items(), key=lambda item: -sum(item[1]))[:_LONGEST]
    return [
        {"name": name, "part": classify(name), "ms": sum(ms) / steps, "calls": len(ms) / steps} for name, ms in ranked
    ]
