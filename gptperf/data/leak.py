"""The share of the validation split that is in the training split, word for word."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptperf.data import window_search
from gptperf.data.shards import TokenSource
from gptperf.data.window_search import NOWHERE, WindowSearch, chunks_of, search
from gptperf.formats import counted

__all__ = ["Leak", "measure_leak"]

WINDOW = 64
"""Tokens of a window."""
_MOST_WINDOWS = 100_000
_MOST_TOKENS = 1_000_000_000


class Leak(NamedTuple):
    """Windows of the validation split, and how many of them occur in the training split."""

    windows: int
    """Windows that were looked for."""
    found: int
    """Windows that occur in the training tokens that were searched."""
    searched: float
    """Share of the training tokens that were searched, 0 to 1."""

    def line(self) -> str:
        """Returns the result in words."""
        share = self.found / max(self.windows, 1)
        part = "" if self.searched == 1 else f", at least: {self.searched:.1%} of the training tokens were searched"
        windows = f"{counted(self.windows, 'validation window')} of {WINDOW} tokens"
        return f"{share:.2%} of {windows} occur verbatim in training{part}"


def measure_leak(path: Path) -> Leak:
    """Looks for windows of the validation split of a data set in its training split.

    The windows do not overlap, and of more than 100,000 of them evenly spaced ones are taken. Every position of the
    training split is compared by a rolling hash, and each hit token by token; of more than a billion tokens, evenly
    spaced parts are searched, which takes about a minute on one core.

    Args:
        path: Folder of the data set.
    """
    with TokenSource.open(path, "val") as val, TokenSource.open(path, "train") as train:
        count = len(val) // WINDOW
        chosen = np.unique(np.linspace(0, max(count - 1, 0), min(count, _MOST_WINDOWS)).astype(np.int64))
        windows = np.empty((len(chosen), WINDOW), val.dtype)
        for row, number in zip(windows, chosen, strict=True):
            val.read_into(int(number) * WINDOW, row)
        if not len(windows):
            return Leak(0, 0, 1.0)
        found = WindowSearch(list(windows), WINDOW)
        begins = chunks_of(train, WINDOW)
        most = max(_MOST_TOKENS // window_search.CHUNK, 1)
        taken = begins if len(begins) <= most else begins[np.linspace(0, len(begins) - 1, most).astype(np.int64)]
        search(train, [found], taken)
        searched = len(taken) / len(begins) if len(begins) else 1.0
        return Leak(len(windows), int(np.count_nonzero(found.first != NOWHERE)), searched)
