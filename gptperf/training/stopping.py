"""When a request to stop is honoured: after an iteration, or in the middle of a long one, which is then dropped."""

import math

from gptperf.distributed.process import Process
from gptperf.distributed.progress import Progress
from gptperf.formats import about
from gptperf.training.signals import StopRequest

__all__ = ["Dropped", "StopPoints", "answer"]

PATIENCE_S = 3.0
"""An iteration or evaluation whose rest takes longer than this is dropped."""
_AGREE_S = 2.0  # seconds between two agreements of the ranks of a job


class Dropped(Exception):
    """The iteration or evaluation was dropped because the run was asked to stop."""


class StopPoints:
    """The points at which a run may stop, on which all ranks agree: a rank that stopped alone would stall the others.

    The ranks agree after each iteration. Inside an iteration or an evaluation they agree as well, about every
    `_AGREE_S` seconds. When that is, follows from the time of the last iteration, which they exchange after it. So in
    iterations of up to `PATIENCE_S` there is no further collective, and the ones in longer iterations are on the host
    and do not wait for the GPU. A single process needs no agreement.

    Args:
        stop: the requests that this rank hears.
        process: this rank.
    """

    def __init__(self, stop: StopRequest, process: Process):
        self._stop, self._process = stop, process
        self._iteration_s: float | None = None
        self._every = 1

    @property
    def may_drop(self) -> bool:
        """Whether the next iteration may be dropped: it is the first one of this process, or the last one was long."""
        return self._iteration_s is None or self._iteration_s > PATIENCE_S

    def after_iteration(self, micro_batches: int) -> int:
        """Returns the request of any rank, at the end of an iteration. Collective: every rank must call it.

        Args:
            micro_batches: micro-batches of an iteration on this rank.
        """
        ms = math.ceil(1e3 * self._process.progress.end_iteration())
        request, ms = self._process.highest_of(self._stop.take(), ms)
        self._iteration_s = ms / 1e3
        self._every = max(1, math.ceil(_AGREE_S * micro_batches / max(self._iteration_s, 1e-3)))
        return request

    def request(self) -> int:
        """Returns the request of any rank, between two tasks. Collective: every rank must call it."""
        return self._process.highest(self._stop.take())

    def drops(self) -> bool:
        """Returns whether to drop the iteration or evaluation whose next part would begin now.

        Collective: every rank must call it after the same parts.
        """
        process = self._process
        if process.progress.part % self._every if process.world_size > 1 else not self._stop.requested:
            return False
        left_ms = math.ceil(1e3 * (process.progress.left_s or 0.0))
        requested, left_ms = process.highest_of(int(self._stop.requested), left_ms)
        return bool(requested) and (self._iteration_s is None or left_ms > 1e3 * PATIENCE_S)


def answer(request: int, progress: Progress, same_s: float) -> str:
    """Returns the line that answers a request.

    Args:
        request: STOP or SAVE of `StopRequest`.
        progress: position of the main thread.
        same_s: seconds in which a second signal counts as the first one.
    """
    if request == StopRequest.SAVE:
        return f"saving after this iteration{about(progress.left_s if progress.kind == 'iteration' else None)}"
    again = f"press again after {same_s:.0f} s" if same_s else "press again"
    return f"{_when(progress)}; {again} to stop now without saving"


def _when(progress: Progress) -> str:
    """Returns at which point a run stops that is asked to now."""
    left, part_left = progress.left_s, progress.part_left_s
    first = progress.iterations == 1 and progress.kind == "iteration"
    ahead = progress.part + 1 < progress.parts  # there is a point before the end
    long = first or left is None or left - (part_left or 0.0) > PATIENCE_S
    match progress.kind:
        case "iteration" if ahead and long and progress.may_drop:
            return f"stopping at the next micro-batch{about(part_left)}, iteration {progress.number} is dropped"
        case "iteration" if first:
            return "stopping after this iteration, the first one, whose time is not known"
        case "iteration":
            return f"stopping after this iteration{about(left)}"
        case "evaluation" if ahead and long:
            return f"stopping at the next batch of the evaluation{about(part_left)}"
        case "evaluation" | "save":
            return f"stopping after this {progress.kind}{about(left)}"
        case "end":
            return "the run is finished and saved, stopping without what is left"
    return "stopping before the first iteration"
