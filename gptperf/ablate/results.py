"""The results of an ablation: final losses, and paired differences over seeds. This module does not import torch."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from gptperf.ablate.variants import Variant
from gptperf.experiment.significance import LEVEL, holm, t_half_width, t_p_value

__all__ = ["Difference", "Result", "difference", "results"]


class Difference(NamedTuple):
    """Final validation losses of a variant minus those of the baseline, paired by seed."""

    by_seed: dict[int, float]
    """Seed -> difference."""
    mean: float
    standard_error: float | None
    """None with one seed."""
    interval: float | None
    """Half of the 95% interval of the mean, by Student's t; None with one seed. It is that of one comparison alone."""
    low: float
    high: float
    p: float | None
    """Two-sided p of the paired t-test of one comparison alone; None with one seed."""
    adjusted_p: float | None
    """The same, adjusted by Holm's method for the number of comparisons; it decides the verdict."""

    @property
    def verdict(self) -> str:
        """Returns in words whether the variant is better or worse than the baseline."""
        if self.adjusted_p is None:
            return "one seed, no spread"
        if self.adjusted_p >= LEVEL:
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
    """Compares losses by seed with those of the baseline, as if it was the only comparison.

    Returns None if they have no seed in common.
    """
    by_seed = {seed: loss - baseline[seed] for seed, loss in losses.items() if seed in baseline}
    if not by_seed:
        return None
    values, count = list(by_seed.values()), len(by_seed)
    error = interval = p = None
    mean = statistics.fmean(values)
    if count > 1:
        error = statistics.stdev(values) / math.sqrt(count)
        interval = error * t_half_width(count - 1)
        t = mean / error if error else math.copysign(math.inf, mean) if mean else 0.0
        p = t_p_value(t, count - 1)
    return Difference(by_seed, mean, error, interval, min(values), max(values), p, p)


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
    return _adjusted(made)


def _adjusted(made: Sequence[Result]) -> list[Result]:
    """Adjusts the p of all differences. A variant without a p yet counts as one that will not differ."""
    known = [1.0 if r.difference is None or r.difference.p is None else r.difference.p for r in made[1:]]
    adjusted = []
    for result, p in zip(made, [None, *holm(known)], strict=True):
        paired = result.difference
        if paired is not None and paired.p is not None:
            result = replace(result, difference=paired._replace(adjusted_p=p))
        adjusted.append(result)
    return adjusted
