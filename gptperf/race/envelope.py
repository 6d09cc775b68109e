"""Token ratios at equal loss between the envelopes of two arms, with a bootstrap over paired seeds. Loads no torch.

An envelope is the lowest loss that an arm has reached with at most so many tokens, where every point is a loss at the
end of a cooldown. Between two points the logarithm of the tokens is linear in the loss. Nothing is extrapolated.

The interval is the expanded percentile interval: a bootstrap over n seeds spreads less than the mean of n seeds, and
its percentiles are moved out so far that the interval of a mean is as wide as that of Student's t (T. Hesterberg, What
teachers should know about the bootstrap, 2015, arXiv:1411.5279, section 5.3). Both arms use the same resampled seeds,
because the runs of a seed read the same data. Up to `_ENUMERATED` seeds all resamples are enumerated.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gptperf.experiment.significance import t_half_width

__all__ = ["FEWEST_SEEDS", "PLACES", "Distance", "Interval", "distances", "log_tokens_at", "product", "t_interval"]

Array = npt.NDArray[np.float64]

FEWEST_SEEDS = 5
"""With n seeds no bootstrap interval goes beyond the smallest and the largest seed, between which the true mean lies
with a probability of 1 - 2^(1-n) if the errors are symmetric: 94% with 5 seeds, 87% with 4."""
PLACES = (1 / 6, 1 / 2, 5 / 6)
"""Places of the three losses in the range that both envelopes cover, from its low end."""
_ENUMERATED = 7
_DRAWN = 10_000


@dataclass(frozen=True)
class Interval:
    """A ratio and its 95% interval; an end that lies outside what was trained is 0 or infinite."""

    ratio: float
    low: float | None
    high: float | None
    """None without an interval: there are too few seeds."""

    @property
    def excludes_one(self) -> bool:
        """Whether the interval lies on one side of 1."""
        return self.low is not None and self.high is not None and (self.high < 1 or self.low > 1)


@dataclass(frozen=True)
class Distance:
    """The horizontal distance between two envelopes: tokens of the second arm divided by those of the first one."""

    losses: tuple[float, ...]
    """The losses at which the envelopes are compared, the highest last."""
    tokens: tuple[tuple[float, float], ...]
    """Tokens of both arms at each of the losses."""
    at_loss: tuple[Interval, ...]
    """Token ratio at each of the losses."""
    whole: Interval
    """Geometric mean of the ratios."""


def distances(first: Array, second: Array, tokens: tuple[Array, Array]) -> Distance | None:
    """Compares two envelopes at three losses; returns None if no loss is on both.

    Args:
        first: Losses of the first arm at the ends of its cooldowns, (seeds, horizons).
        second: The same of the second arm, for the same seeds.
        tokens: Tokens of the horizons of each arm, rising, (horizons,).
    """
    arms, logs = (first, second), [np.log(count) for count in tokens]
    envelopes = [np.minimum.accumulate(arm.mean(0)) for arm in arms]
    low, high = max(envelope[-1] for envelope in envelopes), min(envelope[0] for envelope in envelopes)
    if not low < high:
        return None
    losses = np.array([low + place * (high - low) for place in PLACES])
    at = [log_tokens_at(arm.mean(0)[None], log, losses)[0] for arm, log in zip(arms, logs, strict=True)]
    estimates = at[1] - at[0]
    seeds = len(first)
    intervals: list[tuple[float, float] | None] = [None] * (len(losses) + 1)
    if seeds >= FEWEST_SEEDS:
        weights, chances = _resamples(seeds)
        drawn = [log_tokens_at(weights @ arm, log, losses) for arm, log in zip(arms, logs, strict=True)]
        with np.errstate(invalid="ignore"):
            ratios = drawn[1] - drawn[0]  # NaN where neither envelope reaches the loss
            ratios = np.column_stack([ratios, ratios.mean(1)])
        intervals = [_percentiles(column, chances, seeds) for column in ratios.T]
    values = [*estimates, estimates.mean()]
    *at_loss, whole = [
        Interval(math.exp(value), *((None, None) if found is None else map(math.exp, found)))
        for value, found in zip(values, intervals, strict=True)
    ]
    counts = tuple((math.exp(a), math.exp(b)) for a, b in zip(*at, strict=True))
    return Distance(tuple(map(float, losses)), counts, tuple(at_loss), whole)


def log_tokens_at(curves: Array, log_tokens: Array, losses: Array) -> Array:
    """Returns the logarithm of the tokens at which envelopes reach losses.

    Args:
        curves: Losses at the horizons, (curves, horizons).
        log_tokens: Logarithms of the tokens of the horizons, rising, (horizons,).
        losses: Losses to look for, (losses,).

    Returns:
        (curves, losses); infinite where an envelope ends above the loss, minus infinity where it begins below it.
    """
    envelope = np.minimum.accumulate(curves, axis=1)[:, None, :]
    reached = envelope <= losses[None, :, None]
    right = np.where(reached.any(2), reached.argmax(2), 0)
    left = np.maximum(right - 1, 0)
    rows = np.arange(len(curves))[:, None]
    above, below = envelope[rows, 0, left], envelope[rows, 0, right]
    share = np.divide(above - losses, above - below, out=np.ones_like(above), where=above > below)
    found = log_tokens[left] + share * (log_tokens[right] - log_tokens[left])
    found = np.where((right == 0) & (below < losses), -np.inf, found)
    return np.where(reached.any(2), found, np.inf)


def _resamples(seeds: int) -> tuple[Array, Array]:
    """Returns the weights of the seeds in each resample, (resamples, seeds), and the probability of each resample."""
    if seeds > _ENUMERATED:
        counts = np.random.default_rng(0).multinomial(seeds, [1 / seeds] * seeds, _DRAWN)
        return counts / seeds, np.full(_DRAWN, 1 / _DRAWN)
    chosen = itertools.combinations_with_replacement(range(seeds), seeds)
    weights = np.array([np.bincount(one, minlength=seeds) for one in chosen])
    orders = [math.factorial(seeds) / math.prod(map(math.factorial, row)) for row in weights.tolist()]
    return weights / seeds, np.array(orders) / seeds**seeds


def _percentiles(values: Array, chances: Array, seeds: int) -> tuple[float, float]:
    """Returns both ends of the expanded percentile interval of a resampled figure."""
    level = math.erfc(math.sqrt(seeds / (seeds - 1)) * t_half_width(seeds - 1) / math.sqrt(2)) / 2
    ends = []
    for sign in (1, -1):
        signed = np.where(np.isnan(values), -np.inf, sign * values)  # an unknown figure widens both ends
        order = np.argsort(signed)
        place = int(np.searchsorted(np.cumsum(chances[order]), level, side="right"))
        ends.append(sign * float(signed[order[min(place, len(order) - 1)]]))
    return ends[0], ends[1]


def t_interval(logs: Array) -> Interval:
    """Returns the ratio whose logarithm was measured several times, with the interval of Student's t."""
    mean = float(logs.mean())
    if len(logs) < 2:
        return Interval(math.exp(mean), None, None)
    half = float(logs.std(ddof=1)) / math.sqrt(len(logs)) * t_half_width(len(logs) - 1)
    return Interval(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


def product(a: Interval, b: Interval) -> Interval:
    """Returns the product of two independent ratios.

    The distance of each end from the estimate is the root of the summed squares of those of the factors, in logarithms
    (G. Zou and A. Donner, Construction of confidence limits about effect measures, 2008).
    """
    ratio = a.ratio * b.ratio

    def end(side: str) -> float | None:
        ends: list[Any] = [getattr(one, side) for one in (a, b)]
        if None in ends:
            return None
        if 0 in ends or math.inf in ends:
            return 0.0 if side == "low" else math.inf
        far = math.hypot(*(math.log(end / one.ratio) for end, one in zip(ends, (a, b), strict=True)))
        return ratio * math.exp(-far if side == "low" else far)

    return Interval(ratio, end("low"), end("high"))
