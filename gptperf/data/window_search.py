"""Looks for many short sequences of tokens in a split, at every position of it."""

import concurrent.futures
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gptperf.data.shards import TokenSource

__all__ = ["CHUNK", "NOWHERE", "WindowSearch", "chunks_of", "rolling_hashes", "search"]

CHUNK = 1 << 18
"""Positions that a thread compares at once, which takes 50 bytes of memory for each."""
_MOST_THREADS = 32
NOWHERE = np.iinfo(np.int64).max
"""The position of what was not found."""
_FILTER_BITS = 24
_FACTOR = 0x9E3779B97F4A7C15

Tokens = npt.NDArray[Any]


class WindowSearch:
    """The windows of `width` consecutive tokens of some texts, and where each one occurs first.

    Positions are compared by a rolling hash, and each hit token by token, so that what is found is exact. The memory
    use is 24 bytes a window, and the texts.

    Args:
        texts: Tokens of each text, (n,) integers; a text of fewer than `width` tokens has no window.
        width: Tokens of a window.

    Attributes:
        text_of: Number of the text of each window, (windows,) int64; the windows of a text follow one another.
        first: Where each window occurs first in what was looked through, (windows,) int64, or `NOWHERE`.
    """

    def __init__(self, texts: Sequence[Tokens], width: int) -> None:
        self.width = width
        counts = np.array([max(len(text) - width + 1, 0) for text in texts], np.int64)
        self.text_of = np.repeat(np.arange(len(texts)), counts)
        self.first = np.full(len(self.text_of), NOWHERE)
        self._tokens = np.concatenate([*texts, np.empty(0, np.int64)]).astype(np.int64)
        begins = np.concatenate([[0], np.cumsum([len(text) for text in texts], dtype=np.int64)])[:-1]
        # The position of a window in `_tokens`: the start of its text, plus its number in the text.
        number = np.arange(len(self.text_of)) - np.repeat(np.cumsum(counts) - counts, counts)
        begin = begins[self.text_of] + number if len(counts) else np.empty(0, np.int64)
        hashes = rolling_hashes(self._tokens, width)[begin] if len(begin) else np.empty(0, np.uint64)
        self._order = np.argsort(hashes, kind="stable")
        self._hashes, self._begins = hashes[self._order], begin[self._order]
        # A table that is small enough for the cache says of most positions that none of the windows begins there.
        self._filter = np.zeros(1 << _FILTER_BITS, bool)
        self._filter[hashes >> np.uint64(64 - _FILTER_BITS)] = True
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Returns the number of windows."""
        return len(self.first)

    def look(self, tokens: Tokens, position: int) -> None:
        """Looks through tokens, (n,), which begin at a position of the split. Several threads may call it."""
        hashes = rolling_hashes(tokens, self.width)
        at = np.flatnonzero(self._filter[hashes >> np.uint64(64 - _FILTER_BITS)])
        order = np.argsort(hashes[at], kind="stable")  # equal hashes in the order of their positions
        at = at[order]
        values, begins = np.unique(hashes[at], return_index=True)
        ends = np.append(begins[1:], len(at))
        low = np.searchsorted(self._hashes, values, side="left")
        high = np.searchsorted(self._hashes, values, side="right")
        for i in np.flatnonzero(low < high):
            windows = slice(int(low[i]), int(high[i]))
            self._compare(tokens, at[begins[i] : ends[i]], windows, position)

    def _compare(self, tokens: Tokens, places: Tokens, windows: slice, position: int) -> None:
        """Notes the first of some places at which each of some windows of one hash occurs."""
        numbers, rows = self._order[windows], self._begins[windows, None] + np.arange(self.width)
        wanted = self._tokens[rows]
        for place in places:
            same = (wanted == tokens[place : place + self.width]).all(1)
            with self._lock:
                found = numbers[same]
                self.first[found] = np.minimum(self.first[found], position + int(place))
            if same.all():
                return
            numbers, wanted = numbers[~same], wanted[~same]  # another sequence with the same hash


def chunks_of(source: TokenSource, width: int) -> npt.NDArray[np.int64]:
    """Returns where the chunks begin in which every window of at least `width` tokens of a split begins."""
    return np.arange(0, max(len(source) - width + 1, 0), CHUNK)


def search(source: TokenSource, every: Sequence[WindowSearch], begins: npt.NDArray[np.int64]) -> None:
    """Looks for windows in some chunks of a split, on up to 32 cores; each core has one chunk in memory.

    Args:
        source: The split.
        every: What is looked for, windows of one width each; they get what is found.
        begins: Some of `chunks_of`.

    Raises:
        DataError: A shard is corrupt.
    """

    def one(begin: int) -> None:
        tokens = np.empty(min(CHUNK + longest - 1, len(source) - begin), source.dtype)
        source.read_into(begin, tokens)
        for windows in every:
            windows.look(tokens[: CHUNK + windows.width - 1], begin)

    longest = max((windows.width for windows in every), default=1)
    with concurrent.futures.ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), _MOST_THREADS)) as pool:
        for _ in pool.map(one, begins.tolist()):
            pass


def rolling_hashes(tokens: Tokens, width: int) -> npt.NDArray[np.uint64]:
    """Returns a hash of the window of `width` tokens at each position, (n,) -> (n - width + 1,), or none if n < width.

    The windows of a sum of two widths are made of those of both; a polynomial modulo 2^64.
    """
    hashes = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(_FACTOR)
    hashes ^= hashes >> np.uint64(29)
    whole, done, power, size = None, 0, _FACTOR, 1
    while size <= width:
        if width & size:
            if whole is None:
                whole = hashes
            else:
                count = max(len(hashes) - done, 0)
                whole = whole[:count] * np.uint64(power) + hashes[done : done + count]
            done += size
        hashes = hashes[: max(len(hashes) - size, 0)] * np.uint64(power) + hashes[size:]
        power, size = power * power % 2**64, 2 * size
    assert whole is not None, "the width is above 0"
    return whole[: max(len(tokens) - width + 1, 0)]
