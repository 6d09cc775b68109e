"""Statistics of the loss over a window: mean, variance, spikes and plateaus. Does not import torch."""

import math
from collections import deque
from statistics import fmean, median, variance

from gptperf.monitor.events import Stability

__all__ = ["LossWindow"]

_LEAST = 10  # the window must have this many losses before a loss can count as a spike
_SPIKE_DEVIATIONS = 6.0
_PLATEAU_ERRORS = 2.0


class LossWindow:
    """The last logged losses.

    A spike is a loss that lies more than `_SPIKE_DEVIATIONS` median absolute deviations (scaled to a standard
    deviation) above the median of the losses before it. A plateau is a full window in which the mean of the second half
    is not below the mean of the first half by more than `_PLATEAU_ERRORS` standard errors.

    Args:
        size: number of losses in the window.
    """

    def __init__(self, size: int = 50):
        self.size = size
        self.losses: deque[float] = deque(maxlen=size)

    def add(self, loss: float, skipped: int = 0) -> Stability:
        """Adds a loss, and returns the statistics of the window including it.

        Args:
            loss: loss of a logged step. A loss that is not finite is a spike, and does not enter the window.
            skipped: number of steps skipped so far because of gradients that were not finite.
        """
        before = sorted(self.losses)
        spike = not math.isfinite(loss) or (len(before) >= _LEAST and loss > self._limit(before))
        if math.isfinite(loss):
            self.losses.append(loss)
        found: Stability = {"window": len(self.losses), "spike": spike, "plateau": self._plateau()}
        if self.losses:
            mean = fmean(self.losses)
            found["loss_mean"] = mean
            found["loss_variance"] = fmean((x - mean) ** 2 for x in self.losses)
        found["non_finite"] = skipped
        return found

    @staticmethod
    def _limit(losses: list[float]) -> float:
        """Returns the loss above which the next one is a spike."""
        middle = median(losses)
        # 1.4826 scales the median absolute deviation of a normal distribution to its standard deviation.
        spread = 1.4826 * median(abs(loss - middle) for loss in losses)
        return middle + _SPIKE_DEVIATIONS * max(spread, 1e-3 * abs(middle))

    def _plateau(self) -> bool:
        if len(self.losses) < self.size:
            return False
        losses = list(self.losses)
        first, second = losses[: self.size // 2], losses[self.size // 2 :]
        error = math.sqrt(variance(first) / len(first) + variance(second) / len(second))
        return fmean(first) - fmean(second) <= _PLATEAU_ERRORS * error
