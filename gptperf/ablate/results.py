"""The results of an ablation: final losses, and paired differences over seeds. This module does not import torch."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gptperf.ablate.variants import Variant

__all__ = ["Difference", "Result", "difference", "results"]

_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t of a two-sided 95% interval with 1 to 9 degrees of freedom."""


class Difference(NamedTuple):
    """Final validation losses of a variant minus those of the baseline, paired by seed."""

    by_seed: dict[int, float]
    """Seed -> difference."""
    mean: float
    standard_error: float | None
    """None with one seed."""
    interval: float | None
    """Half of the 95% interval of the mean, by Student's t; None with one seed."""
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Returns in words whether the variant is better or worse than the baseline."""
        if self.interval is None:
            return "one seed, no spread"
        if abs(self.mean) <= self.interval:
            return "within the spread"
        return "better" if self.mean < 0 else "worse"


@dataclass(frozen=True)
class Result:
    """The combined results of the finished runs of a variant."""

    variant: Variant
    losses: dict[int, float]
    """Seed -> final validation loss, for each finished run."""
    difference: Difference | None
    """Difference to the baseline; None for the baseline itself."""
    tokens_per_sec: float | None
    mfu_percent: float | None
    mfu_scale: str | None

    @property
    def mean(self) -> float | None:
        """Mean final validation loss."""
        return statistics.fmean(self.losses.values()) if self.losses else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the final validation loss over the seeds."""
        return statistics.stdev(self.losses.values()) if len(self.losses) > 1 else None


def difference(losses: dict[int, float], baseline: dict[int, float]) -> Difference | None:
    """Compares losses by seed with those of the baseline; returns None if they have no seed in common."""
    by_seed = {seed: loss - baseline[seed] for seed, loss in losses.items() if seed in baseline}
    if not by_seed:
        return None
    values, count = list(by_seed.values()), len(by_seed)
    error = interval = None
    if count > 1:
        error = statistics.stdev(values) / math.sqrt(count)
        interval = error * _t95(count - 1)
    return Difference(by_seed, statistics.fmean(values), error, interval, min(values), max(values))


def _t95(freedom: int) -> float:
    """Returns Student's t of a two-sided 95% interval; beyond the table, by an expansion that is accurate to 0.1%."""
    return _T95[freedom - 1] if freedom <= len(_T95) else 1.95996 + 2.3723 / freedom + 2.8225 / freedom**2


def results(found: Sequence[Variant]) -> list[Result]:
    """Reads the logs of all runs and returns the result of every variant."""
    made: list[Result] = []
    for variant in found:
        losses = {job.seed: loss for job in variant.jobs if (loss := job.val_loss()) is not None}
        logs = [log for job in variant.jobs if job.seed in losses and (log := job.log()) is not None]
        speeds = [log.tokens_per_sec for log in logs if log.tokens_per_sec is not None]
        mfus = [log.mfu_percent for log in logs if log.mfu_percent is not None]
        made.append(
            Result(
                variant,
                losses,
                difference(losses, made[0].losses) if made else None,
                statistics.fmean(speeds) if speeds else None,
                statistics.fmean(mfus) if mfus else None,
                next((log.mfu_scale for log in logs if log.mfu_scale), None),
            )
        )
    return made
