"""Mixtures of data sets by weight, such as `web:0.7,code:0.3`."""

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gptperf.data.shards import TokenSource
from gptperf.errors import DataError

__all__ = ["MixedTokens", "parse_mixture"]

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


class MixedTokens:
    """The training tokens of a mixture: the streams of its data sets, one after the other.

    Args:
        sources: Training split of each data set.
        weights: Share of the samples of each data set; they sum to 1.

    Attributes:
        dtype: uint16 or uint32, that of every data set.
        path: Folder of the first data set, for messages.
        fingerprint: SHA-256 (hex) over the fingerprints and weights of the data sets, in their order.

    Raises:
        DataError: The data sets have different tokenizers.
    """

    def __init__(self, sources: Sequence[TokenSource], weights: Sequence[float]) -> None:
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
