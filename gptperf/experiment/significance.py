"""Student's t and Holm's correction for several comparisons. This module does not import torch."""

import math
from collections.abc import Sequence

__all__ = ["LEVEL", "holm", "t_half_width", "t_p_value"]

LEVEL = 0.05
"""A difference counts if its p is below this."""


def t_p_value(t: float, freedom: int) -> float:
    """Returns the two-sided p of Student's t: how often |t| or more occurs by chance if the true mean is 0.

    The distribution function is a finite sum for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).

    Args:
        t: the statistic; infinite where all differences are the same.
        freedom: degrees of freedom, 1 or more.
    """
    angle = math.atan(abs(t) / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(2 + odd, freedom + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    within = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return min(max(1 - within, 0.0), 1.0)


def t_half_width(freedom: int) -> float:
    """Returns the t whose two-sided p is `LEVEL`: half the width of a 95% interval in standard errors."""
    low, high = 0.0, 13.0  # 12.706 with one degree of freedom, less with more
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if t_p_value(middle, freedom) > LEVEL else (low, middle)
    return high


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns the p values of several comparisons, adjusted by Holm's method.

    With them, the chance that any comparison without a true difference falls below `LEVEL` is at most `LEVEL`. The
    smallest of m values is multiplied by m, the next by m - 1, and so on; no value is below the value of a smaller p
    (S. Holm, 1979).
    """
    adjusted, most = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        most = max(most, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = most
    return adjusted
