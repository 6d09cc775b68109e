"""Writes the shards of one split, and goes on with those of a killed writer."""

import contextlib
import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from gptperf.data.format import HEADER_BYTES, Header, Shard, Split

__all__ = ["SplitWriter"]


class SplitWriter:
    """Writes the shards of one split. It has one open file, the counts of that file and its running checksum."""

    def __init__(
        self, folder: Path, split: str, dtype: np.dtype[Any], shard_tokens: int, state: dict[str, Any]
    ) -> None:
        self._folder = folder
        self._split = split
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._shards = [Shard(**shard) for shard in state.get("shards", ())]
        self._file: BinaryIO | None = None
        self._begin()
        if state.get("open"):
            self._go_on(Shard(**state["open"]))

    def state(self) -> dict[str, Any]:
        """Makes what was written durable, and returns what a new writer needs to go on."""
        if self._file is None:
            opened = None
        else:
            self._file.flush()
            os.fsync(self._file.fileno())
            opened = dataclasses.asdict(self._described())
        return {"shards": [dataclasses.asdict(shard) for shard in self._shards], "open": opened}

    @staticmethod
    def check(folder: Path, split: str, state: dict[str, Any], dtype: np.dtype[Any]) -> int:
        """Compares the shards of a saved state with their files, and returns the number of documents.

        Raises:
            ValueError: A shard differs.
            OSError: A shard cannot be read.
        """
        shards = [Shard(**shard) for shard in (*state["shards"], *filter(None, [state["open"]]))]
        for shard in shards:
            if _digest_of(folder / shard.file, shard.bytes).hexdigest() != shard.sha256:
                raise ValueError(shard.file)
        return sum(shard.documents for shard in shards)

    def _go_on(self, shard: Shard) -> None:
        """Opens the shard that was not complete."""
        path = self._folder / shard.file
        self._digest = _digest_of(path, shard.bytes)
        self.tokens, self.documents, self._max_id = shard.tokens, shard.documents, shard.max_id
        self._file = path.open("r+b", buffering=1 << 20)
        self._file.truncate(shard.bytes)
        self._file.seek(shard.bytes)

    def _described(self) -> Shard:
        return Shard(
            file=f"{self._split}_{len(self._shards):05d}.bin",
            tokens=self.tokens,
            documents=self.documents,
            max_id=self._max_id,
            bytes=HEADER_BYTES + self.tokens * self._dtype.itemsize,
            sha256=self._digest.hexdigest(),
        )

    def _begin(self) -> None:
        self._digest = hashlib.sha256()
        self.tokens = self.documents = self._max_id = 0

    def append(self, tokens: npt.NDArray[Any], max_id: int) -> None:
        """Writes ids of the shard's dtype; `max_id` is the largest of them."""
        while len(tokens):
            if self.tokens == self._shard_tokens:
                self._end_shard()
            part = tokens[: self._shard_tokens - self.tokens]
            if self._file is None:
                path = self._folder / f"{self._split}_{len(self._shards):05d}.bin"
                self._file = path.open("wb", buffering=1 << 20)
                self._file.write(bytes(HEADER_BYTES))  # `_end_shard` overwrites it with the header
            data = np.ascontiguousarray(part).data.cast("B")
            self._file.write(data)
            self._digest.update(data)
            self.tokens += len(part)
            self._max_id = max(self._max_id, max_id if len(part) == len(tokens) else int(part.max()))
            tokens = tokens[len(part) :]
            if len(tokens):
                max_id = int(tokens.max())

    def _end_shard(self) -> None:
        assert self._file is not None
        header = Header(
            itemsize=self._dtype.itemsize, tokens=self.tokens, documents=self.documents, max_id=self._max_id
        )
        self._file.seek(0)
        self._file.write(header.pack())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self._shards.append(self._described())
        self._begin()

    def total(self) -> tuple[int, int]:
        """Returns the numbers of tokens and documents written so far."""
        tokens = sum(shard.tokens for shard in self._shards) + self.tokens
        return tokens, sum(shard.documents for shard in self._shards) + self.documents

    def finish(self) -> Split:
        """Closes the last shard and returns the entry of this split in the manifest."""
        if self._file is not None:
            self._end_shard()
        tokens, documents = self.total()
        return Split(tokens=tokens, documents=documents, shards=tuple(self._shards))

    def abandon(self) -> None:
        """Closes the open file of a data set that is not committed."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # the flush fails on a full disk, whose error is being raised already
                self._file.close()


def _digest_of(path: Path, size: int) -> "hashlib._Hash":
    """Returns the running SHA-256 of the tokens in the first `size` bytes of a shard.

    Raises:
        ValueError: The file is shorter.
    """
    digest, left = hashlib.sha256(), size - HEADER_BYTES
    with path.open("rb") as file:
        file.seek(HEADER_BYTES)
        while left:
            data = file.read(min(left, 1 << 20))
            if not data:
                raise ValueError(path)
            digest.update(data)
            left -= len(data)
    return digest
