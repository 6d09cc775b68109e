"""Finds the learning rate of every variant before the comparison. This module does not import torch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gptperf.ablate.variants import Job, Variant, with_jobs
from gptperf.errors import ConfigError
from gptperf.formats import number

__all__ = ["FACTORS", "factors_of", "notes", "state_of_rate", "tuned", "tuning_runs", "without_rate"]

FACTORS = "0.5,1,2"
"""Learning rates that are tried, as multiples of the variant's own."""
_MOST = 9


def factors_of(text: str) -> tuple[float, ...]:
    """Reads the multiples of the learning rate that are tried.

    Raises:
        ConfigError: They are not 2 to 9 different numbers from 0.001 to 1000.
    """
    try:
        factors = sorted({float(part) for part in text.split(",")})
    except ValueError:
        factors = []
    if not (2 <= len(factors) <= _MOST and all(1e-3 <= factor <= 1e3 for factor in factors)):
        raise ConfigError(
            f"command line: lr_factors: found {text!r}, wanted 2 to {_MOST} different numbers from 0.001 to 1000; "
            f"nearest: --lr_factors={FACTORS}"
        )
    return tuple(factors)


def tuning_runs(found: Sequence[Variant]) -> list[Variant]:
    """Returns the variants with the runs that find their learning rates instead of the runs that are compared."""
    return [replace(variant, jobs=variant.tuning) for variant in found]


def tuned(found: Sequence[Variant], argv: Sequence[str], seeds: int, out: Path) -> list[Variant]:
    """Returns the variants with the runs that are compared, at the learning rate with the lowest validation loss."""
    return [with_jobs(variant, argv, seeds, out, _best(variant)) for variant in found]


def without_rate(found: Sequence[Variant]) -> list[str]:
    """Returns the names of the variants for which no learning rate was found: no run that tries one has finished."""
    return [variant.name for variant in found if variant.tuning and _best(variant) is None]


def _best(variant: Variant) -> Job | None:
    """Returns the run with the lowest validation loss of those that find the learning rate, or None."""
    losses = [(loss, place) for place, job in enumerate(variant.tuning) if (loss := job.val_loss()) is not None]
    return variant.tuning[min(losses)[1]] if losses else None


def state_of_rate(variant: Variant) -> str:
    """Returns in words whether the learning rate of a variant is the best one of several."""
    if not variant.tuning:
        return "not tuned"
    return "not tuned yet" if _best(variant) is None else "tuned"


def notes(variant: Variant, failed: Mapping[Path, str]) -> list[str]:
    """Returns lines about the learning rates that were tried, and which one is best."""
    best = _best(variant)
    tried = [
        f"{job.config.optimizer.learning_rate:g} -> {failed.get(job.out_dir, number(job.val_loss(), '.4f'))}"
        for job in variant.tuning
    ]
    line = f"{variant.name}: validation loss by learning rate: {', '.join(tried)}"
    if best is None:
        return [f"{line}; none has finished."]
    lines = [f"{line}; {best.config.optimizer.learning_rate:g} is compared."]
    if best in (variant.tuning[0], variant.tuning[-1]):
        lines.append(
            f"{variant.name}: the best learning rate is at the end of those tried: --lr_factors may go further."
        )
    return lines
