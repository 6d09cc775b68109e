"""Compares measured throughput with the analytical prediction: a verdict for each cell, and forecasts for other GPUs.

The prediction (`gptperf.plan`) comes from FLOPs, bytes and the GPU table alone, and the measurement from a clock. They
agree within the band only if count, table and program are right; with half the peak in the table, for example, they do
not agree. This module does not import torch.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.measure.models import DEFAULT_VARIANT, config_of
from bench.results import Record
from gptperf import hardware, plan
from gptperf.config import Config
from gptperf.formats import mfu_scale
from gptperf.hardware import Gpu

__all__ = ["BAND", "OTHERS", "Check", "Forecast", "check", "forecasts", "measured_steps", "verdict_line"]

BAND = 0.10
OTHERS = ("B200", "H200", "H100", "A100 SXM 80 GB", "V100 SXM2 32 GB")
"""Rows of the GPU table that a model is predicted for."""


@dataclass(frozen=True)
class Check:
    """Measurement and prediction of one cell."""

    cell: str
    measured_tokens_s: float
    predicted_tokens_s: float | None
    reason: str | None = None
    """The reason why there is no prediction; None if there is one."""

    @property
    def ratio(self) -> float | None:
        """Measured over predicted tokens/s."""
        return None if self.predicted_tokens_s is None else self.measured_tokens_s / self.predicted_tokens_s

    @property
    def passed(self) -> bool:
        """Whether the ratio is within the band; False without a prediction."""
        return self.ratio is not None and abs(self.ratio - 1) <= BAND


@dataclass(frozen=True)
class Forecast:
    """The prediction of a model on one GPU."""

    gpu: str
    dtype: str
    tokens_s: float
    mfu: float | None
    """MFU from 0 to 1."""
    mfu_scale: str
    band: float
    fits: bool


def measured_steps(records: Mapping[str, Record]) -> dict[str, Record]:
    """Returns the cells with a timed step. A waterfall cell stands in for a missing step cell of its model."""
    done = {cell: record for cell, record in records.items() if record["status"] == "done"}
    steps = {cell: record for cell, record in done.items() if cell.startswith("step/")}
    for cell, record in done.items():
        name = f"step/{cell.partition('/')[2]}/{DEFAULT_VARIANT}"
        if cell.startswith("waterfall/") and name not in steps:
            steps[cell] = record
    return steps


def check(cell: str, record: Record, gpu: Gpu | None) -> Check:
    """Compares one cell with the prediction.

    Args:
        cell: Name of the cell.
        record: Its result, with configuration and figures.
        gpu: The GPU that it was measured on, or None for a GPU that is not in the table.
    """
    config = config_of(record["config"])
    measured = float(record["results"]["tokens_per_sec"])
    reason = plan.unplannable(config, gpu)
    if reason is not None or gpu is None:
        return Check(cell, measured, None, reason)
    return Check(cell, measured, plan.plan(config, gpu, recompute=config.system.recompute).tokens_per_sec)


def gpu_of(record: Record) -> Gpu | None:
    """Returns the row of the GPU table for the device of a result, or None."""
    made_by = record["environment"]
    return hardware.match_gpu(made_by["device"], made_by.get("memory_gb"))


def verdict_line(checks: Sequence[Check]) -> str:
    """Returns a line with PASS or FAIL, which the cells of the default variant decide."""
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
    """Predicts a step on the GPUs of `OTHERS`; in float16 if a card does not support bfloat16."""
    found = []
    for name in OTHERS:
        gpu = plan.find_gpu(name)
        low = config.system.compute_dtype == "bfloat16" and not hardware.has_bfloat16(gpu.capability)
        system = dataclasses.replace(config.system, dtype="float16") if low else config.system
        there = dataclasses.replace(config, system=system)
        if plan.unplannable(there, gpu) is not None:
            continue
        one: Any = plan.plan(there, gpu, recompute=there.system.recompute)
        scale = mfu_scale(one.peak)
        found.append(Forecast(gpu.name, system.dtype, one.tokens_per_sec, one.mfu, scale, one.band, one.fits))
    return found
