"""Tracks where the main thread of a rank is, for the watchdog and its messages."""

import contextlib
from collections.abc import Iterator

__all__ = ["Progress"]


class Progress:
    """The position of the main thread. The main thread writes it, and the watchdog's threads read it.

    Every rank passes the same places in the same order and counts them. So the others wait for the rank with the lowest
    count.
    """

    def __init__(self) -> None:
        self.phase, self.iterations = "start", 0
        self.waiting = ""
        """Name of the collective that the main thread is in, or empty."""
        self.count = 0
        """Places passed: begins and ends of iterations, collectives, evaluations and saves."""
        self.limited = False
        """Whether it is a fault if no rank passes a place within the timeout."""

    def start_iteration(self, number: int) -> None:
        """Notes that an iteration begins. The first iteration of a process compiles, and has no time limit."""
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
