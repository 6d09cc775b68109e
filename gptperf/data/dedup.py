"""Finds copies of documents: exact ones by their SHA-256, near ones by MinHash (`datasketch`, extra data)."""

import importlib
import itertools
import re
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from gptperf.data.text import Document
from gptperf.errors import DataError, DeviceError, nearest
from gptperf.formats import counted

__all__ = ["DEDUP", "Copies", "HashSet"]

DEDUP = ("exact", "near", "off")
_BANDS, _ROWS = 12, 10
"""MinHash values of a document are compared in bands of `_ROWS`. Documents with a share s of common shingles have a
band in common with probability 1 - (1 - s**10)**12: 99% for s = 0.9, 74% for 0.8, 29% for 0.7, 1% for 0.5."""
_SHINGLE_WORDS = 5
_CHUNK = 1 << 13
_RECENT = 1 << 16

Hashes = npt.NDArray[np.uint64]


class HashSet:
    """A set of 64-bit hashes that takes 8 bytes for each of them."""

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._sorted: list[Hashes] = []  # each at least twice as long as the next one

    def __contains__(self, value: int) -> bool:
        if value in self._recent:
            return True
        key = np.uint64(value)
        for part in self._sorted:
            at = int(np.searchsorted(part, key))
            if at < len(part) and part[at] == key:
                return True
        return False

    def add(self, value: int) -> None:
        """Adds a hash."""
        self._recent.add(value)
        if len(self._recent) < _RECENT:
            return
        merged = np.sort(np.fromiter(self._recent, np.uint64, len(self._recent)))
        self._recent = set()
        while self._sorted and len(self._sorted[-1]) < 2 * len(merged):
            merged = np.concatenate([self._sorted.pop(), merged])
            merged.sort(kind="stable")
        self._sorted.append(merged)


class Copies:
    """Finds the documents that are copies of earlier ones.

    Args:
        kind: One of `DEDUP`; "off" counts the exact copies and leaves them in.

    Attributes:
        exact: Number of exact copies so far.
        near: Number of near copies so far.
        bytes: Their length in bytes.
    """

    def __init__(self, kind: str) -> None:
        if kind not in DEDUP:
            raise DataError(f"--dedup: found {kind!r}, wanted one of {', '.join(DEDUP)}{nearest(kind, DEDUP)}")
        self._kind = kind
        self._digests, self._bands = HashSet(), HashSet()
        self.exact = self.near = self.bytes = 0
        self._minhash: Any = None
        if kind == "near":
            try:
                library: Any = importlib.import_module("datasketch")
            except ImportError as error:
                raise DeviceError(
                    "--dedup=near needs the package datasketch, which is not installed: pip install 'gptperf[data]'"
                ) from error
            self._minhash = library.MinHash(num_perm=_BANDS * _ROWS, seed=1, hashfunc=int)

    def drop(self, document: Document) -> tuple[Document, bool]:
        """Returns the document, whose pieces are then those of the result, and whether it is left out as a copy."""
        digest = int.from_bytes(document.digest[:8], "big")
        if digest in self._digests:
            self.exact += 1
            self.bytes += document.size
            return document, self._kind != "off"
        self._digests.add(digest)
        if self._kind != "near":
            return document, False
        first = next(document.pieces)
        document = document._replace(pieces=itertools.chain([first], document.pieces))
        bands = self._bands_of(first)
        if any(band in self._bands for band in bands):
            self.near += 1
            self.bytes += document.size
            return document, True
        for band in bands:
            self._bands.add(band)
        return document, False

    def _bands_of(self, text: bytes) -> list[int]:
        """Returns a hash for each band of MinHash values of the words of a text; a document of few words has none."""
        words = np.fromiter((zlib.crc32(word) for word in re.findall(rb"[^\W_]+", text.lower())), np.uint64)
        if len(words) < 2 * _SHINGLE_WORDS:
            return []
        shingles = np.zeros(len(words) - _SHINGLE_WORDS + 1, np.uint64)
        for i in range(_SHINGLE_WORDS):
            shingles = shingles * np.uint64(0x9E3779B97F4A7C15) + words[i : len(shingles) + i]
        shingles = np.unique((shingles * np.uint64(0xD6E8FEB86659FD93)) >> np.uint64(32))
        minhash = self._minhash.copy()
        minhash.clear()
        for begin in range(0, len(shingles), _CHUNK):  # each takes `num_perm` times its memory
            minhash.update_batch(shingles[begin : begin + _CHUNK].tolist())
        values = np.ascontiguousarray(minhash.hashvalues.reshape(_BANDS, _ROWS), "<u8")
        sums = [(zlib.crc32(row.tobytes()), zlib.adler32(row.tobytes())) for row in values]
        return [(band * 0x9E3779B97F4A7C15 ^ high << 32 ^ low) % 2**64 for band, (high, low) in enumerate(sums, 1)]

    def lines(self) -> list[str]:
        """Returns what was found, in words."""
        kept = "kept, as --dedup=off" if self._kind == "off" else "removed"
        lines = [f"{counted(self.exact, 'exact copy', 'exact copies')} of documents: {kept}"] if self.exact else []
        if self.near:
            lines.append(f"{counted(self.near, 'near copy', 'near copies')} of documents: removed")
        if lines:
            lines.append(f"the copies have {counted(self.bytes, 'byte')} of text")
        return lines
