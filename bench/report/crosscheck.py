"""Measured throughput against the analytical prediction: one verdict a cell, and the prediction for other GPUs.

The prediction (`gptperf.plan`) comes from FLOPs, bytes and the GPU table alone; the measurement from a stopwatch. They
agree within the band only where count, table and program are right: with half the peak in the table they do not. No
torch here.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.measure.models import DEFAULT_VARIANT, config_of
from bench.results import Record
from gptperf import hardware, plan
from gptperf.config import Config
from gptperf.hardware import Gpu

__all__ = ["BAND", "OTHERS", "Check", "Forecast", "check", "forecasts", "measured_steps", "verdict_line"]

BAND = 0.10
OTHERS = ("B200", "H200", "H100", "A100 SXM 80 GB", "V100 SXM2 32 GB")
"""Rows of the GPU table that a model is predicted for."""


@dataclass(frozen=True)
class Check:
    """One cell."""

    cell: str
    measured_tokens_s: float
    predicted_tokens_s: float | None
    reason: str | None = None
    """Why there is no prediction."""

    @property
    def ratio(self) -> float | None:
        """Measured over predicted."""
        return None if self.predicted_tokens_s is None else self.measured_tokens_s / self.predicted_tokens_s

    @property
    def passed(self) -> bool:
        """Within the band; False without a prediction."""
        return self.ratio is not None and abs(self.ratio - 1) <= BAND


@dataclass(frozen=True)
class Forecast:
    """A model on a GPU that need not be here."""

    gpu: str
    dtype: str
    tokens_s: float
    mfu: float | None
    """0..1."""
    band: float
    fits: bool


def measured_steps(records: Mapping[str, Record]) -> dict[str, Record]:
    """Cells with a timed step; a waterfall's stands in for the step's own cell where that is missing."""
    done = {cell: record for cell, record in records.items() if record["status"] == "done"}
    steps = {cell: record for cell, record in done.items() if cell.startswith("step/")}
    for cell, record in done.items():
        name = f"step/{cell.partition('/')[2]}/{DEFAULT_VARIANT}"
        if cell.startswith("waterfall/") and name not in steps:
            steps[cell] = record
    return steps


def check(cell: str, record: Record, gpu: Gpu | None) -> Check:
    """Compare one cell with the prediction.

    Args:
        cell: its name.
        record: with the configuration and the figures.
        gpu: the row of the GPU that it was measured on, or None.
    """
    config = config_of(record["config"])
    measured = float(record["results"]["tokens_per_sec"])
    reason = plan.unplannable(config, gpu)
    if reason is not None or gpu is None:
        return Check(cell, measured, None, reason)
    return Check(cell, measured, plan.plan(config, gpu, recompute=config.system.recompute).tokens_per_sec)


def gpu_of(record: Record) -> Gpu | None:
    """The row of the GPU that a record is from."""
    made_by = record["environment"]
    return hardware.match_gpu(made_by["device"], made_by.get("memory_gb"))


def verdict_line(checks: Sequence[Check]) -> str:
    """PASS or FAIL in one line: it is that of the cells that run as a training run does unless told otherwise."""
    deciding = [c for c in checks if c.cell.endswith(f"/{DEFAULT_VARIANT}") or c.cell.startswith("waterfall/")]
    if not deciding:
        return f"cross-check: none, no step of {DEFAULT_VARIANT} was measured"
    known = [c for c in deciding if c.ratio is not None]
    if not known:
        return f"cross-check: none, {deciding[0].reason}"
    passed = all(c.passed for c in known)
    found = ", ".join(f"{c.cell.split('/')[1]} {c.ratio:.3f}" for c in known if c.ratio is not None)
    return (
        f"cross-check: {'PASS' if passed else 'FAIL'}: measured over predicted tokens/s {found}; band +-{BAND:.0%}, "
        f"{DEFAULT_VARIANT}"
    )


def forecasts(config: Config) -> list[Forecast]:
    """The same step on the GPUs of `OTHERS`, in float16 where the card has no bfloat16."""
    found = []
    for name in OTHERS:
        gpu = plan.find_gpu(name)
        low = config.system.compute_dtype == "bfloat16" and not hardware.has_bfloat16(gpu.capability)
        system = dataclasses.replace(config.system, dtype="float16") if low else config.system
        there = dataclasses.replace(config, system=system)
        if plan.unplannable(there, gpu) is not None:
            continue
        one: Any = plan.plan(there, gpu, recompute=there.system.recompute)
        found.append(Forecast(gpu.name, system.dtype, one.tokens_per_sec, one.mfu, one.band, one.fits))
    return found
