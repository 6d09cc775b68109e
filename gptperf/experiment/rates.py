"""Learning rates that are tried before runs are compared. This module does not import torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from gptperf.config import Config
from gptperf.errors import ConfigError
from gptperf.experiment.job import LEARNING_RATES, Job
from gptperf.formats import number

__all__ = ["FACTORS", "TUNING_SEED", "at_the_edge", "best_of", "factors_of", "losses_by_rate", "scaled_rates"]

TUNING_SEED = 1_000_000
"""Distance of the seed with which learning rates are found from the first seed of the comparison, which uses fewer."""
FACTORS = "0.5,1,2"
"""Learning rates that an ablation tries, as multiples of the variant's own."""
_MOST = 9


def factors_of(text: str, default: str = FACTORS) -> tuple[float, ...]:
    """Reads the multiples of the learning rate that are tried.

    Args:
        text: Numbers with commas.
        default: What the command tries without the flag, the nearest valid value.

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
            f"nearest: --lr_factors={default}"
        )
    return tuple(factors)


def scaled_rates(config: Config, factor: float) -> dict[str, float]:
    """Returns the learning rates of a configuration times a factor, as keys and values."""
    rates = {
        key: float(f"{factor * value:.6g}")
        for key in LEARNING_RATES
        if (value := getattr(config.optimizer, key)) is not None
    }
    return rates | {"min_lr": min(rates["min_lr"], rates["learning_rate"])}


def best_of(jobs: Sequence[Job]) -> Job | None:
    """Returns the run with the lowest validation loss, or None if none has finished."""
    losses = [(loss, place) for place, job in enumerate(jobs) if (loss := job.val_loss()) is not None]
    return jobs[min(losses)[1]] if losses else None


def at_the_edge(jobs: Sequence[Job], best: Job) -> bool:
    """Returns whether a run has the lowest or the highest learning rate of those that were tried."""
    return best in (jobs[0], jobs[-1])


def losses_by_rate(jobs: Sequence[Job], failed: Mapping[Path, str]) -> str:
    """Returns the validation loss of every learning rate in one line."""
    return ", ".join(
        f"{job.config.optimizer.learning_rate:g} -> {failed.get(job.out_dir, number(job.val_loss(), '.4f'))}"
        for job in jobs
    )
