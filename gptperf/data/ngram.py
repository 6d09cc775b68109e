"""Losses of unigram, bigram and trigram models, which are baselines for a language model on bytes.

The models are smoothed by the interpolated method of Witten and Bell (1991). For a context h with `count(h)`
occurrences and `types(h)` distinct successors,

    p(c | h) = (count(h, c) + types(h) * p(c | shorter h)) / (count(h) + types(h))

and the empty context is interpolated with the uniform distribution over the vocabulary. The method has no parameter to
fit, and the probabilities sum to one.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from gptperf.data.shards import TokenSource
from gptperf.formats import counted

__all__ = ["MAX_VOCAB_SIZE", "NgramLosses", "ngram_losses", "trigram_loss"]

MAX_VOCAB_SIZE = 512
"""The trigram counts are a dense cube over the ids that occur: at most 8 bytes * 257**3 = 136 MB for bytes."""
_CHUNK = 1 << 23

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NgramLosses:
    """Mean validation losses in nats per token; each model is evaluated on the tokens that have a full context."""

    unigram: float
    bigram: float
    trigram: float


def trigram_loss(train: TokenSource, val: TokenSource) -> float:
    """Returns the trigram loss of `ngram_losses` in nats per token."""
    return ngram_losses(train, val).trigram


def ngram_losses(train: TokenSource, val: TokenSource) -> NgramLosses:
    """Counts n-grams on `train` and evaluates them on `val`.

    Raises:
        ValueError: The vocabulary is larger than `MAX_VOCAB_SIZE`, or a split has fewer than 3 tokens.
    """
    vocab_size = train.vocab_size
    if vocab_size > MAX_VOCAB_SIZE:
        raise ValueError(f"vocab_size: found {vocab_size}, wanted at most {MAX_VOCAB_SIZE} for n-gram counts")
    for source in (train, val):
        if len(source) < 3:
            raise ValueError(
                f"{source.path}: found {counted(len(source), 'token')} in {source.split!r}, wanted at least 3"
            )
    dense, size = _dense_ids(train, val)
    levels = [_Level(train, dense, size, order) for order in (1, 2, 3)]
    means = []
    for order in (1, 2, 3):
        total = 0.0
        for keys in _keys(val, dense, size, order):
            probability: Array = np.full(len(keys), 1 / vocab_size)
            for level in levels[:order]:
                probability = level.interpolate(keys, probability)
            total -= float(np.log(probability).sum())
        means.append(total / (len(val) - order + 1))
    return NgramLosses(unigram=means[0], bigram=means[1], trigram=means[2])


class _Level:
    """Counts of the n-grams of one order, indexed by key: a number whose digits are the ids, the newest id last."""

    def __init__(self, source: TokenSource, dense: Array, size: int, order: int) -> None:
        self._counts = np.zeros(size**order, np.int64)
        for keys in _keys(source, dense, size, order):
            self._counts += np.bincount(keys, minlength=size**order)
        self._size = size
        by_context = self._counts.reshape(-1, size)
        self._totals = by_context.sum(1)
        self._types = np.count_nonzero(by_context, axis=1)

    def interpolate(self, keys: Array, lower: Array) -> Array:
        """Returns p(newest id | context), (n,).

        Args:
            keys: Keys of n-grams of this order or a higher one, (n,).
            lower: Probabilities of the next lower order, (n,).
        """
        keys = keys % len(self._counts)
        context = keys // self._size
        weight = self._totals[context] + self._types[context]  # 0 for a context that does not occur
        return np.where(weight > 0, (self._counts[keys] + self._types[context] * lower) / np.maximum(weight, 1), lower)


def _dense_ids(*sources: TokenSource) -> tuple[Array, int]:
    """Numbers the ids that occur in the sources; returns the table id -> number, and the number of ids that occur."""
    present = np.zeros(max(source.max_id for source in sources) + 1, bool)
    for source in sources:
        for tokens in _chunks(source, overlap=0):
            present |= np.bincount(tokens, minlength=len(present)) > 0
    return np.cumsum(present) - 1, int(np.count_nonzero(present))


def _keys(source: TokenSource, dense: Array, size: int, order: int) -> Iterator[Array]:
    """Yields the keys of all n-grams of a source in order, chunk by chunk, (n,) int64."""
    for tokens in _chunks(source, overlap=order - 1):
        ids = dense[tokens]
        count = len(ids) - order + 1
        keys = ids[:count]
        for newer in range(1, order):
            keys = keys * size + ids[newer : newer + count]
        yield keys


def _chunks(source: TokenSource, overlap: int) -> Iterator[Array]:
    """Yields the tokens in chunks of `_CHUNK`, each with the `overlap` tokens after it, (n,)."""
    for begin in range(0, len(source) - overlap, _CHUNK):
        tokens = np.empty(min(_CHUNK + overlap, len(source) - begin), source.dtype)
        source.read_into(begin, tokens)
        yield tokens
