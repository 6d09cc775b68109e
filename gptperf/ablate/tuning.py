"""Finds the learning rate of every variant before the comparison. This module does not import torch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gptperf.ablate.variants import Variant, with_jobs
from gptperf.experiment.job import Job
from gptperf.experiment.rates import at_the_edge, best_of, losses_by_rate

__all__ = ["notes", "state_of_rate", "tuned", "tuning_runs", "without_rate"]


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
    return best_of(variant.tuning)


def state_of_rate(variant: Variant) -> str:
    """Returns in words whether the learning rate of a variant is the best one of several."""
    if not variant.tuning:
        return "not tuned"
    return "not tuned yet" if _best(variant) is None else "tuned"


def notes(variant: Variant, failed: Mapping[Path, str]) -> list[str]:
    """Returns lines about the learning rates that were tried, and which one is best."""
    best = _best(variant)
    line = f"{variant.name}: validation loss by learning rate: {losses_by_rate(variant.tuning, failed)}"
    if best is None:
        return [f"{line}; none has finished."]
    lines = [f"{line}; {best.config.optimizer.learning_rate:g} is compared."]
    if at_the_edge(variant.tuning, best):
        lines.append(
            f"{variant.name}: the best learning rate is at the end of those tried: --lr_factors may go further."
        )
    return lines
