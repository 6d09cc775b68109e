"""Tracks where the main thread of a rank is, for the watchdog, the live panel and the answers to signals."""

import contextlib
import time
from collections.abc import Iterator

__all__ = ["Progress"]

_NEW_SHARE = 0.1  # weight of the last iteration in the mean time of an iteration


class Progress:
    """The position of the main thread. The main thread writes it, and other threads read it.

    Every rank passes the same places in the same order and counts them. So the others wait for the rank with the lowest
    count. Times are those of the host, which may be ahead of a GPU.
    """

    def __init__(self) -> None:
        self.phase, self.iterations = "start", 0
        self.waiting = ""
        """Name of the collective that the main thread is in, or empty."""
        self.count = 0
        """Places passed: begins and ends of iterations, collectives, evaluations and saves."""
        self.limited = False
        """Whether it is a fault if no rank passes a place within the timeout."""
        self.kind = "start"
        """What the main thread does: "start", "iteration", "evaluation", "save" or "end"."""
        self.parts, self.part = 1, 0
        """Number of parts of an iteration (micro-batches) or an evaluation (batches), and how many of them are done."""
        self.number = self.finished = self.max_iters = 0
        """The iteration that began last, the last one that is done, and the last one of the run."""
        self.may_drop = False
        """Whether the iteration is dropped at the next micro-batch if a request to stop comes."""
        self.eval_interval = 0
        """Iterations between two evaluations; 0 if there are none."""
        self.iteration_s: float | None = None
        """Mean time of the last iterations. The first iteration of a process compiles and does not count."""
        self.evaluation_s: float | None = None
        """Time of the last evaluation."""
        self._since = self._part_since = time.monotonic()
        self._part_s = 0.0

    def start_iteration(self, number: int, parts: int = 1) -> None:
        """Notes that an iteration begins. The first iteration of a process compiles, and has no time limit.

        Args:
            number: number of the iteration, from 1.
            parts: micro-batches of this rank.
        """
        self.phase, self.limited = f"iteration {number}", self.iterations > 0
        self.iterations += 1
        self.count += 1
        self.number = number
        self._begin("iteration", parts)

    def end_iteration(self) -> float:
        """Notes that the device has ended the iteration or is about to, and returns its seconds."""
        seconds = self.seconds
        if self.iterations > 1:
            before = seconds if self.iteration_s is None else self.iteration_s
            self.iteration_s = before + _NEW_SHARE * (seconds - before)
        self._begin("iteration", 1)
        return seconds

    def _begin(self, kind: str, parts: int) -> None:
        self.kind, self.parts, self.part, self._part_s = kind, parts, 0, 0.0
        self._since = self._part_since = time.monotonic()

    def end_part(self) -> None:
        """Notes that a micro-batch of an iteration or a batch of an evaluation has ended."""
        now = time.monotonic()
        self._part_s, self._part_since = now - self._part_since, now
        self.part += 1
        self.count += 1

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Notes that the body is a long task between iterations, such as an evaluation, without a time limit."""
        outer = self.phase, self.limited
        self.phase, self.limited = f"{what} after {self.phase}", False
        self.count += 1
        self._begin(what, 1)
        yield
        if what == "evaluation":
            self.evaluation_s = self.seconds
        self.phase, self.limited = outer
        self.count += 1
        self._begin("iteration", 1)

    @contextlib.contextmanager
    def collective(self, name: str) -> Iterator[None]:
        """Notes that the body waits for the other ranks.

        If the body raises, the name of the collective stays set: it says where the error came from.
        """
        outer, self.waiting = self.waiting, name
        self.count += 1
        yield
        self.waiting = outer
        self.count += 1

    @property
    def where(self) -> str:
        """The phase and, if there is one, the collective, as text for a message."""
        return f"{self.waiting} ({self.phase})" if self.waiting else self.phase

    @property
    def seconds(self) -> float:
        """Seconds since the iteration, the evaluation or the save began."""
        return time.monotonic() - self._since

    @property
    def left_s(self) -> float | None:
        """Seconds until the iteration or the evaluation ends, if they can be estimated."""
        usual = {"iteration": self.iteration_s, "evaluation": self.evaluation_s}.get(self.kind)
        left = [] if usual is None else [usual - self.seconds]
        if 0 < self.part < self.parts:
            # The last part tells more than the mean, because a machine may become busy. But the host may be ahead of a
            # GPU, and then only the mean includes the GPU's time.
            left.append((self.parts - self.part) * self._part_s - (time.monotonic() - self._part_since))
        return max(*left, 0.0) if left else None

    @property
    def part_left_s(self) -> float | None:
        """Seconds until the next micro-batch or batch begins, if they can be estimated."""
        if self.part:
            return max(self._part_s - (time.monotonic() - self._part_since), 0.0)
        left = self.left_s
        return None if left is None else left / self.parts

    def run_left_s(self, iteration_s: float | None = None) -> float | None:
        """Returns the seconds until the end of the run, evaluations included once one has been timed.

        Args:
            iteration_s: time of an iteration; by default the mean of the last ones. Without both, returns None.
        """
        usual = self.iteration_s if iteration_s is None else iteration_s
        if usual is None:
            return None
        left = self.max_iters - self.finished
        evaluations = 0
        if self.eval_interval and left > 0:  # one at every interval, and one at the end
            evaluations = -(-self.max_iters // self.eval_interval) - self.finished // self.eval_interval
        done_s = min(self.seconds, usual) if self.kind == "iteration" and self.finished < self.number else 0.0
        return max(left * usual + evaluations * (self.evaluation_s or 0.0) - done_s, 0.0)
