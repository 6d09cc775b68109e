"""Work that several ranks do together: they exchange values, and an error of one rank is raised on all. No torch."""

import contextlib
import errno
from collections.abc import Iterator
from typing import Any, Protocol

from gptperf.errors import DiskError, GptperfError

__all__ = ["Ranks", "SingleRank", "fail_together"]


class Ranks(Protocol):
    """The ranks that work together, as one of them sees them."""

    @property
    def rank(self) -> int:
        """This rank."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""

    def exchange(self, value: Any) -> list[Any]:
        """Returns the value of every rank, in rank order. Collective: every rank must call it."""


class SingleRank:
    """The only rank of its job."""

    rank, world_size = 0, 1

    def exchange(self, value: Any) -> list[Any]:
        """Returns the one value."""
        return [value]


@contextlib.contextmanager
def fail_together(ranks: Ranks, what: str) -> Iterator[None]:
    """Runs the body, and fails on every rank if the body fails on one. Collective: every rank must enter.

    Without this, the other ranks would go on to a collective that the failed rank never joins, and wait in it.

    Args:
        ranks: the ranks that work together.
        what: what the body does, for the message of an `OSError`.

    Raises:
        GptperfError: the error of this rank, or else the error of the lowest rank that has one; an `OSError` becomes a
            `DiskError`. Any other exception is a bug and is raised on its rank alone.
    """
    error: GptperfError | None = None
    try:
        yield
    except OSError as caught:
        error = DiskError(f"{what} failed: {caught}", full=caught.errno in (errno.ENOSPC, errno.EDQUOT))
        error.__cause__ = caught
    except GptperfError as caught:
        error = caught
    for rank, other in enumerate(ranks.exchange(error and (type(error), str(error), getattr(error, "full", False)))):
        if other is not None and error is None:
            kind, text, full = other
            text = f"rank {rank}: {text}"
            error = DiskError(text, full=full) if kind is DiskError else kind(text)
    if error is not None:
        raise error
