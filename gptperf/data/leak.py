"""The share of the validation split that is in the training split, word for word."""

import concurrent.futures
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gptperf.data.shards import TokenSource

__all__ = ["Leak", "measure_leak"]

WINDOW = 64
"""Tokens of a window."""
_MOST_WINDOWS = 100_000
_MOST_TOKENS = 1_000_000_000
_CHUNK = 1 << 20
_FILTER_BITS = 24
_FACTOR = 0x9E3779B97F4A7C15

Hashes = npt.NDArray[np.uint64]


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
        return f"{share:.2%} of {self.windows:,} validation windows of {WINDOW} tokens occur verbatim in training{part}"


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
        search = _Search(windows)
        begins = np.arange(0, max(len(train) - WINDOW + 1, 0), _CHUNK)
        most = max(_MOST_TOKENS // _CHUNK, 1)
        taken = begins if len(begins) <= most else begins[np.linspace(0, len(begins) - 1, most).astype(np.int64)]
        with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for at in range(0, len(taken), 64):  # the tokens of 64 chunks are in memory
                chunks = [_read(train, int(begin)) for begin in taken[at : at + 64]]
                list(pool.map(search.look, chunks))
        return Leak(len(windows), search.found(), len(taken) / len(begins) if len(begins) else 1.0)


def _read(source: TokenSource, begin: int) -> npt.NDArray[Any]:
    tokens = np.empty(min(_CHUNK + WINDOW - 1, len(source) - begin), source.dtype)
    source.read_into(begin, tokens)
    return tokens


class _Search:
    """Windows that are looked for, (n, WINDOW) ids, in order of their hashes."""

    def __init__(self, windows: npt.NDArray[Any]) -> None:
        hashes = np.concatenate([_rolling(row) for row in windows])
        order = np.argsort(hashes, kind="stable")
        self._windows, self._hashes = windows[order], hashes[order]
        self._found = np.zeros(len(windows), bool)
        # A table that is small enough for the cache says of most positions that none of the windows begins there.
        self._filter = np.zeros(1 << _FILTER_BITS, bool)
        self._filter[hashes >> np.uint64(64 - _FILTER_BITS)] = True

    def look(self, tokens: npt.NDArray[Any]) -> None:
        """Marks the windows that occur in tokens, (n,)."""
        hashes = _rolling(tokens)
        at = np.flatnonzero(self._filter[hashes >> np.uint64(64 - _FILTER_BITS)])
        if not len(at):
            return
        values, first = np.unique(hashes[at], return_index=True)
        low = np.searchsorted(self._hashes, values, side="left")
        high = np.searchsorted(self._hashes, values, side="right")
        for i in np.flatnonzero(low < high):
            part = tokens[at[first[i]] :][:WINDOW]
            same = (self._windows[low[i] : high[i]] == part).all(1)
            self._found[low[i] : high[i]] |= same

    def found(self) -> int:
        """Returns the number of windows that were found."""
        return int(self._found.sum())


def _rolling(tokens: npt.NDArray[Any]) -> Hashes:
    """Returns a hash of the window that begins at each token, (n,) -> (n - WINDOW + 1,)."""
    hashes = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(_FACTOR)
    hashes ^= hashes >> np.uint64(29)
    power, width = _FACTOR, 1
    while width < WINDOW:  # of two windows of one width, one of twice the width
        hashes = hashes[: len(hashes) - width] * np.uint64(power) + hashes[width:]
        power, width = power * power % 2**64, 2 * width
    return hashes
