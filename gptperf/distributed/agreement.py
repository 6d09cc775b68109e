"""Work that several ranks do together: they exchange values, and an error of one rank is raised on all. No torch."""

import contextlib
import errno
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from gptperf.errors import DiskError, GptperfError

__all__ = ["Ranks", "SingleRank", "fail_together", "told_once"]


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


@contextlib.contextmanager
def told_once() -> Iterator[None]:
    """Lets one rank of this host alone report an error of the body that several ranks meet, before they join the job.

    The ranks cannot talk to each other yet. Under torchrun they share a folder, in which the first rank with an error
    makes a file that is named after the error. Without torchrun every rank reports its error.

    Raises:
        GptperfError: the error of this rank, if no other rank has reported it.
        SystemExit: another rank has reported the same error.
    """
    try:
        yield
    except GptperfError as error:
        given = os.environ.get("TORCHELASTIC_ERROR_FILE")  # .../attempt_N/LOCAL_RANK/error.json, removed by torchrun
        if given:
            claim = Path(given).parents[1] / f"gptperf-{hashlib.sha256(str(error).encode()).hexdigest()}"
            try:
                claim.touch(exist_ok=False)
            except FileExistsError:
                sys.exit(error.exit_code)
            except OSError:
                pass  # the folder cannot be written, so this rank reports too
        raise
