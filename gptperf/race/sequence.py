"""A confidence sequence for the mean of paired differences: it holds at all times at once. Loads no torch.

The differences are taken for independent and normal with an unknown variance. Then this ratio is a martingale while the
true mean is m, so that the chance that it ever reaches 1 / level is at most level, however often one looks (T. L. Lai,
On confidence sequences, 1976; H. Wang and A. Ramdas, Anytime-valid t-tests and confidence sequences for Gaussian means
with unknown variance, 2023, arXiv:2310.03722):

    sqrt(a) * ((1 + a u) / (1 + u)) ^ (-n / 2),   a = c / (c + n),   u = n (mean - m)^2 / (sum of squared deviations)

It is the likelihood ratio of the t statistic after n differences, with a normal prior on the effect in standard
deviations, whose variance is 1 / c. All m at which it has not reached 1 / level are in the sequence.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Bounds", "bounds"]

_PRIOR = 0.1
"""c: a prior of variance 10. With it, 4 differences can decide an effect of 3.3 standard deviations, and 8 of 1.6."""


class Bounds(NamedTuple):
    """The mean so far, and the means that are not excluded; infinite as long as nothing is."""

    mean: float
    low: float
    high: float


def bounds(differences: Sequence[float], level: float) -> Bounds:
    """Returns the intersection of the confidence sequence up to now.

    Args:
        differences: Paired differences in their order.
        level: Probability with which the true mean is ever outside.
    """
    low, high = -math.inf, math.inf
    for count in range(2, len(differences) + 1):
        part = differences[:count]
        mean = statistics.fmean(part)
        squares = math.fsum((value - mean) ** 2 for value in part)
        a = _PRIOR / (_PRIOR + count)
        k = (1 / (level**2 * a)) ** (1 / count)
        if k * a < 1:  # otherwise no mean is excluded yet
            half = math.sqrt((k - 1) / (1 - k * a) * squares / count)
            low, high = max(low, mean - half), min(high, mean + half)
    return Bounds(statistics.fmean(differences) if differences else math.nan, low, high)
