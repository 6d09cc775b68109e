"""Profile of a few iterations of a run: a trace for Perfetto, the waterfall of MFU points, the longest kernels."""

import contextlib
import gzip
import json
import os
from pathlib import Path
from typing import Any

import torch

from gptperf import flops
from gptperf.config import Config
from gptperf.hardware import Peak
from gptperf.monitor import waterfall
from gptperf.monitor.clock import StepClock
from gptperf.monitor.events import Profile

__all__ = ["StepProfiler", "lines_of"]

_LONGEST = 25
_SHOWN = 8


class StepProfiler:
    """Records the iterations START to STOP of `log.profile`, in the main process.

    Args:
        config: of the run.
        num_gpus: of the job.
        peak: of one GPU, for the waterfall; None where it is not known.
        enabled: whether this process records: the main one does, the others know which iterations they are.
    """

    def __init__(self, config: Config, num_gpus: int, peak: Peak | None, enabled: bool):
        self.config, self.num_gpus, self.peak, self.enabled = config, num_gpus, peak, enabled
        text = config.log.profile
        self.first, self.last = (int(number) for number in text.split(":")) if text else (0, -1)
        self._profile: Any = None
        self._pause = contextlib.ExitStack()

    def covers(self, iteration: int) -> bool:
        """Whether an iteration is recorded: its time is not that of others."""
        return self.first <= iteration <= self.last

    def before(self, iteration: int, clock: StepClock) -> None:
        """An iteration that is recorded is about to begin. The clock stands still until the last one has ended."""
        if self.enabled and self._profile is None:
            kinds = torch.profiler.ProfilerActivity
            on_gpu = torch.cuda.is_available() and self.config.system.device != "cpu"
            self._pause.enter_context(clock.paused())
            self._first = iteration
            self._profile = torch.profiler.profile(activities=[kinds.CPU, *([kinds.CUDA] if on_gpu else [])])
            self._profile.__enter__()

    def after(self, iteration: int) -> Profile | None:
        """An iteration was enqueued; what was found, after the last one."""
        if self._profile is None or iteration < self.last:
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
        kernels = waterfall.kernels_of(trace)
        if not kernels:
            return found
        parts = waterfall.breakdown(kernels, steps, waterfall.waits_of(trace))
        found |= {"step_ms": parts.step_ms, "parts_ms": parts.parts_ms, "kernels": _longest(kernels, steps)}
        if self.peak is not None and flops.uncountable_flops(self.config.model) is None:
            work = waterfall.step_flops(self.config, self.num_gpus)
            fall = waterfall.waterfall(parts, work, self.peak.flop_s, parts.step_ms)
            found |= {"waterfall": fall.lost_points, "mfu_percent": fall.mfu_percent}
        return found


def _export(profile: Any, path: Path) -> dict[str, Any]:
    """Write a trace, whole or not at all."""
    tmp = path.with_name(f".tmp-{path.name.removesuffix('.gz')}")
    profile.export_chrome_trace(str(tmp))
    text = tmp.read_bytes()
    tmp.unlink()
    packed = tmp.with_name(f"{tmp.name}.gz")
    packed.write_bytes(gzip.compress(text, 5))
    os.replace(packed, path)
    trace: dict[str, Any] = json.loads(text)
    return trace


def _longest(kernels: list[waterfall.Kernel], steps: int) -> list[dict[str, Any]]:
    totals: dict[str, list[float]] = {}
    for kernel in kernels:
        totals.setdefault(kernel.name, []).append(kernel.duration_us / 1e3)
    ranked = sorted(totals.items(), key=lambda item: -sum(item[1]))[:_LONGEST]
    return [
        {"name": name, "part": waterfall.classify(name), "ms": sum(ms) / steps, "calls": len(ms) / steps}
        for name, ms in ranked
    ]


def lines_of(found: Profile) -> list[str]:
    """A profile for the console."""
    lines = [f"profile of {found['steps']} iterations: {found['trace']} (open it at ui.perfetto.dev)"]
    points_lost = found.get("waterfall")
    if "parts_ms" in found:
        parts = [f"{name} {ms:.2f} ms" for name, ms in found["parts_ms"].items() if ms > 0]
        lines.append(f"  {found['step_ms']:.2f} ms an iteration: {', '.join(parts)}")
    if points_lost is not None:
        points = [f"{name} {value:.2f}" for name, value in points_lost.items() if value]
        lines.append(f"  100 points of MFU: {', '.join(points)}, left {found['mfu_percent']:.2f}")
    for kernel in found.get("kernels", [])[:_SHOWN]:
        lines.append(f"  {kernel['ms']:>9.3f} ms {kernel['calls']:>7.1f} x {kernel['part']:<14}{kernel['name'][:70]}")
    return lines
