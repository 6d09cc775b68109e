"""Where the main thread of a rank is, for the watchdog and its messages."""

import contextlib
from collections.abc import Iterator

__all__ = ["Progress"]


class Progress:
    """The position of the main thread, which writes it and which the watchdog's threads read.

    Every rank goes through the same places in the same order and counts them. So the rank with the lowest count is the
    one that the others wait for.
    """

    def __init__(self) -> None:
        self.phase, self.iterations = "start", 0
        self.waiting = ""
        """Name of the collective that the main thread is in, or empty."""
        self.count = 0
        """Places passed: begins and ends of iterations, collectives, evaluations and saves."""
        self.limited = False
        """Whether it is a fault if no rank moves for the timeout."""

    def start_iteration(self, number: int) -> None:
        """Notes that an iteration begins. The first one of a process compiles, and has no time limit."""
        self.phase, self.limited = f"iteration {number}", self.iterations > 0
        self.iterations += 1
        self.count += 1

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Notes that the body is a long task between iterations, such as an evaluation, without a time limit."""
        outer = self.phase, self.limited
        self.phase, self.limited = f"{what} after {self.phase}", False
        self.count += 1
        yield
        self.phase, self.limited = outer
        self.count += 1

    @contextlib.contextmanager
    def collective(self, name: str) -> Iterator[None]:
        """Notes that the body waits for the other ranks.

        If it raises, the name stays in place: it says where the error came from.
        """
        outer, self.waiting = self.waiting, name
        self.count += 1
        yield
        self.waiting = outer
        self.count += 1

    @property
    def where(self) -> str:
        """The collective, if any, and the phase, for a message."""
        return f"{self.waiting} ({self.phase})" if self.waiting else self.phase
