"""Processes that do something together, each its part, and that fail together. No torch."""

import contextlib
import errno
from collections.abc import Iterator
from typing import Any, Protocol

from gptperf.errors import DiskError, GptperfError

__all__ = ["Alone", "Peers", "together"]


class Peers(Protocol):
    """This process among those that take part."""

    @property
    def rank(self) -> int:
        """Of this process."""

    @property
    def world_size(self) -> int:
        """How many there are."""

    def exchange(self, value: Any) -> list[Any]:
        """The value of every process, by rank; each has to ask."""


class Alone:
    """One process."""

    rank, world_size = 0, 1

    def exchange(self, value: Any) -> list[Any]:
        """The one value."""
        return [value]


@contextlib.contextmanager
def together(peers: Peers, what: str) -> Iterator[None]:
    """Do something that has succeeded when it has in every process; what fails in one is raised in all.

    Raises:
        GptperfError: of this process, else of the first one that has any; an `OSError` is a `DiskError`.
    """
    error: GptperfError | None = None
    try:
        yield
    except OSError as caught:
        error = DiskError(f"{what} failed: {caught}", full=caught.errno in (errno.ENOSPC, errno.EDQUOT))
        error.__cause__ = caught
    except GptperfError as caught:
        error = caught
    for rank, other in enumerate(peers.exchange(error and (type(error), str(error), getattr(error, "full", False)))):
        if other is not None and error is None:
            kind, text, full = other
            text = f"rank {rank}: {text}"
            error = DiskError(text, full=full) if kind is DiskError else kind(text)
    if error is not None:
        raise error
