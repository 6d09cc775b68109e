"""Mixtures of data sets by weight, such as `web:0.7,code:0.3`."""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gptperf.data.order import BatchOrder, MixedOrder
from gptperf.data.shards import TokenSource, resolve_dataset
from gptperf.errors import DataError

__all__ = [
    "MixedTokens",
    "Part",
    "open_tokens",
    "order_of",
    "parse_mixture",
    "parts_of",
    "read_shares",
    "weighted_names",
]

_PART = re.compile(r"(?P<name>.+):(?P<weight>[0-9.eE+-]+)")


def parse_mixture(dataset: str) -> list[tuple[str, float]] | None:
    """Returns the names and weights of `NAME:WEIGHT,NAME:WEIGHT,...`; the weights are scaled to a sum of 1.

    Returns None for the name or path of a single data set, which has no comma and does not end in a weight.

    Raises:
        DataError: A part has no weight, a weight is not above 0, or a name occurs twice.
    """
    parts = [part.strip() for part in dataset.split(",")]
    matches = [_PART.fullmatch(part) for part in parts]
    if not any(matches):
        return None
    names: list[str] = []
    weights: list[float] = []
    for part, match in zip(parts, matches, strict=True):
        if match is None:
            raise DataError(f"dataset: found {part!r} in a mixture, wanted NAME:WEIGHT; nearest: '{part or 'NAME'}:1'")
        try:
            weight = float(match["weight"])
        except ValueError:
            weight = 0.0
        if not 0 < weight < float("inf"):
            raise DataError(
                f"dataset: found the weight {match['weight']!r} of {match['name']!r}, wanted a number above 0"
            )
        if match["name"] in names:
            raise DataError(f"dataset: found {match['name']!r} twice in a mixture, wanted it once, with one weight")
        names.append(match["name"])
        weights.append(weight)
    total = sum(weights)
    return [(name, weight / total) for name, weight in zip(names, weights, strict=True)]


def weighted_names(dataset: str, data_dir: str | os.PathLike[str]) -> list[tuple[str, float]]:
    """Returns the names and weights of what `dataset` names: of each data set of a mixture, or one name of weight 1.

    A folder of exactly that name is one data set.

    Raises:
        DataError: See `parse_mixture`.
    """
    if os.path.isdir(dataset) or os.path.isdir(Path(data_dir) / dataset):
        return [(dataset, 1.0)]
    return parse_mixture(dataset) or [(dataset, 1.0)]


def open_tokens(
    dataset: str,
    data_dir: str | os.PathLike[str],
    split: str,
    *,
    vocab_size: int | None = None,
    verify: bool = True,
) -> "TokenSource | MixedTokens":
    """Opens a split of a data set or of a mixture; the arguments are those of `resolve_dataset` and `TokenSource.open`.

    Raises:
        DataError: A data set is missing or corrupt or does not fit `vocab_size`, or a mixture is not valid.
    """
    parts = weighted_names(dataset, data_dir)
    paths = [resolve_dataset(name, data_dir) for name, _ in parts]
    sources = [TokenSource.open(path, split, vocab_size, verify) for path in paths]
    if len(parts) == 1:
        return sources[0]
    return MixedTokens(sources, [weight for _, weight in parts], [name for name, _ in parts])


class MixedTokens:
    """One split of a mixture: the streams of its data sets, one after the other.

    Args:
        sources: The split of each data set.
        weights: Share of the samples of each data set; they sum to 1.
        names: Name of each data set in messages and logs; default: the name in its manifest.

    Attributes:
        dtype: uint16 or uint32, that of every data set.
        path: Folder of the first data set, for messages.
        fingerprint: SHA-256 (hex) over the fingerprints and weights of the data sets, in their order.

    Raises:
        DataError: The data sets have different tokenizers.
    """

    def __init__(self, sources: Sequence[TokenSource], weights: Sequence[float], names: Sequence[str] = ()) -> None:
        first = sources[0].manifest.tokenizer
        for source in sources[1:]:
            found = source.manifest.tokenizer
            if found.fingerprint != first.fingerprint:
                raise DataError(
                    f"{source.path}: found the tokenizer {found.name!r} of {found.vocab_size} ids, wanted that of "
                    f"{sources[0].path}, {first.name!r} of {first.vocab_size}: a mixture has one tokenizer"
                )
        self.path = sources[0].path
        self.sources = tuple(sources)
        self.weights = tuple(weights)
        self.names = tuple(names) or tuple(source.manifest.name for source in sources)
        self.dtype = sources[0].dtype
        self._ends = np.cumsum([len(source) for source in sources], dtype=np.int64)
        digest = hashlib.sha256(b"gptperf mixture 1\n")
        for source, weight in zip(sources, weights, strict=True):
            digest.update(f"{source.fingerprint} {weight!r}\n".encode())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        """Returns the number of tokens."""
        return int(self._ends[-1])

    def read_rows(self, offsets: npt.NDArray[np.int64], out: npt.NDArray[Any]) -> None:
        """Fills row r of `out`, (R, W), with the W tokens from `offsets[r]` on; see `TokenSource.read_rows`.

        A row lies within one data set, because the blocks of `MixedOrder` do.
        """
        which = np.searchsorted(self._ends, offsets, side="right")
        for i in np.unique(which):
            source, mine = self.sources[i], np.flatnonzero(which == i)
            rows = np.empty((len(mine), out.shape[1]), out.dtype)
            source.read_rows(offsets[mine] - (int(self._ends[i]) - len(source)), rows)
            out[mine] = rows


class Part(NamedTuple):
    """A data set of a mixture, or the only one."""

    name: str
    weight: float
    source: TokenSource


def parts_of(tokens: TokenSource | MixedTokens) -> list[Part]:
    """Returns the data sets of a mixture, or the only one with the weight 1."""
    if not isinstance(tokens, MixedTokens):
        return [Part(tokens.manifest.name, 1.0, tokens)]
    return [Part(*part) for part in zip(tokens.names, tokens.weights, tokens.sources, strict=True)]


def order_of(tokens: TokenSource | MixedTokens, block_size: int, seed: int) -> BatchOrder | MixedOrder:
    """Returns the order in which training reads the tokens.

    Raises:
        DataError: A data set is too short, or its weight too small.
    """
    if not isinstance(tokens, MixedTokens):
        return BatchOrder(len(tokens), block_size, seed)
    for name, _, source in parts_of(tokens):
        try:
            BatchOrder(len(source), block_size, seed)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
    return MixedOrder([len(source) for source in tokens.sources], tokens.weights, block_size, seed)


def read_shares(order: BatchOrder | MixedOrder, samples: int) -> list[tuple[float, float]]:
    """Returns share and epochs of each data set after the first `samples` samples of a run."""
    if isinstance(order, BatchOrder):
        return [(1.0, samples / order.n_blocks)]
    counts = order.samples_of(samples)
    return [(count / max(samples, 1), count / part.n_blocks) for count, part in zip(counts, order.orders, strict=True)]
