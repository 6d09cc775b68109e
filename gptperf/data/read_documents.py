"""Which documents the samples of a training run are made of, from the order of the data and the document index."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gptperf.data.documents import DocumentIndex, Origin
from gptperf.data.mixture import MixedTokens, order_of, parts_of
from gptperf.data.order import MixedOrder, Offsets
from gptperf.data.shards import TokenSource

__all__ = ["ReadDocument", "documents_read"]

_CHUNK = 1 << 16
"""Number of samples that are looked up at once."""


class ReadDocument(NamedTuple):
    """A document of which a run read tokens."""

    dataset: str
    """Name of the data set in its mixture."""
    origin: Origin
    tokens: int
    """Tokens that were read, repetitions included."""


def documents_read(
    tokens: TokenSource | MixedTokens, *, block_size: int, seed: int, first: int, last: int
) -> list[ReadDocument]:
    """Returns the documents of the samples [first, last), in the order in which they were first read.

    A sample is `block_size` inputs and the target of the last one. The end of a document belongs to it.

    Args:
        tokens: the training data; its tokens are not read.
        block_size: number of inputs of a sample.
        seed: seed of the order.
        first: first sample.
        last: the sample after the last one.

    Raises:
        DataError: A data set has no document index, or one that is corrupt.
    """
    order, parts = order_of(tokens, block_size, seed), parts_of(tokens)
    indexes = [DocumentIndex(part.source.manifest, part.source.path, part.source.split) for part in parts]
    ends = [index.records["end"].astype(np.int64) for index in indexes]
    bases = np.concatenate([[0], np.cumsum([len(index) for index in indexes])])
    totals: dict[int, int] = {}  # in the order of insertion
    for begin in range(first, last, _CHUNK):
        samples = np.arange(begin, min(begin + _CHUNK, last), dtype=np.int64)
        which, within = order.locate(samples) if isinstance(order, MixedOrder) else (np.zeros_like(samples), samples)
        orders = order.orders if isinstance(order, MixedOrder) else [order]
        found = []
        for i, part_order in enumerate(orders):
            mine = np.flatnonzero(which == i)
            place, documents, counts = _spans(part_order.offsets(within[mine]), block_size + 1, ends[i])
            found.append((mine[place], documents + bases[i], counts))
        _add(totals, found)
    return [_document(key, count, parts, indexes, bases) for key, count in totals.items()]


def _spans(starts: Offsets, width: int, ends: Offsets) -> tuple[Offsets, Offsets, Offsets]:
    """Returns the documents of each range of tokens [start, start + width): number of the range, document, tokens."""
    firsts = np.searchsorted(ends, starts, side="right")
    counts = np.searchsorted(ends, starts + width - 1, side="right") - firsts + 1
    place = np.repeat(np.arange(len(starts)), counts)
    documents = firsts[place] + np.arange(len(place)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = np.where(documents > 0, ends[documents - 1], 0)
    overlap = np.minimum(ends[documents], starts[place] + width) - np.maximum(begins, starts[place])
    return place, documents, overlap


def _add(totals: dict[int, int], found: Sequence[tuple[Offsets, Offsets, Offsets]]) -> None:
    """Adds the tokens of each document to `totals`, in the order of the samples."""
    samples, keys, counts = (np.concatenate(column) for column in zip(*found, strict=True))
    in_order = np.argsort(samples, kind="stable")
    keys, firsts, inverse = np.unique(keys[in_order], return_index=True, return_inverse=True)
    sums = np.bincount(inverse, counts[in_order]).astype(np.int64)
    for i in np.argsort(firsts):
        totals[int(keys[i])] = totals.get(int(keys[i]), 0) + int(sums[i])


def _document(
    key: int,
    count: int,
    parts: Sequence[tuple[str, float, TokenSource]],
    indexes: Sequence[DocumentIndex],
    bases: npt.NDArray[np.int64],
) -> ReadDocument:
    i = int(np.searchsorted(bases, key, side="right")) - 1
    return ReadDocument(parts[i][0], indexes[i].origin(key - int(bases[i])), count)
