"""Checksums of the blocks of a data set's shards, so that damage is found where it is read.

A block is 64 KiB of a shard file, counted from its first byte; the last block of a file may be shorter. `checksums.bin`
has the CRC-32 of every block as little-endian uint32: the blocks of each shard in order, the shards in the manifest's
order, the training split first. CRC-32 finds every burst of up to 32 wrong bits, and any other damage but one case in
2**32. `zlib.crc32` runs at 1.4 GB/s on one core and releases the GIL; SHA-256 would be half as fast.
"""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptperf.data.format import SPLITS, DatasetManifest, Shard
from gptperf.errors import DataError
from gptperf.formats import counted

__all__ = ["BLOCK_BYTES", "BlockChecksums", "CHECKSUMS", "block_sum", "block_sums"]

BLOCK_BYTES = 1 << 16
CHECKSUMS = "checksums.bin"

Sums = npt.NDArray[np.uint32]


def block_sums(path: Path) -> Sums:
    """Returns the CRC-32 of every block of a file, (blocks,) uint32."""
    sums = []
    with path.open("rb", buffering=0) as file:
        while data := file.read(BLOCK_BYTES):
            while len(data) < BLOCK_BYTES and (more := file.read(BLOCK_BYTES - len(data))):
                data += more
            sums.append(zlib.crc32(data))
    return np.array(sums, "<u4")


def block_sum(fd: int, begin: int) -> int:
    """Returns the CRC-32 of the block of an open file that begins at the offset `begin`."""
    return zlib.crc32(_read_bytes(fd, begin, begin + BLOCK_BYTES))


class BlockChecksums:
    """The checksums of one split, and which blocks this process has verified.

    Threads may verify at the same time; a block may then be verified twice.

    Attributes:
        read_bytes: Bytes that were read in order to verify blocks.
    """

    def __init__(self, shards: Sequence[Shard], sums: Sums) -> None:
        counts = [-(-shard.bytes // BLOCK_BYTES) for shard in shards]
        self._shards = shards
        self._first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._sums = sums
        self._verified = np.zeros(len(sums), bool)
        self.read_bytes = 0

    @classmethod
    def read(cls, manifest: DatasetManifest, folder: Path, split: str) -> "BlockChecksums | None":
        """Reads the checksums of a split; returns None for a data set of version 1, which has none.

        Raises:
            DataError: `checksums.bin` is missing or corrupt.
        """
        if CHECKSUMS not in manifest.files:
            return None
        sums = np.frombuffer(manifest.read_file(folder, CHECKSUMS), "<u4")
        counts = {
            name: sum(-(-shard.bytes // BLOCK_BYTES) for shard in manifest.splits[name].shards) for name in SPLITS
        }
        if len(sums) != sum(counts.values()):
            raise DataError(
                f"{folder / CHECKSUMS}: found {counted(len(sums), 'checksum')}, wanted {sum(counts.values()):,} for "
                "the shards; prepare the data set again"
            )
        begin = 0 if split == SPLITS[0] else counts[SPLITS[0]]
        return cls(manifest.splits[split].shards, sums[begin : begin + counts[split]])

    def __len__(self) -> int:
        """Returns the number of blocks."""
        return len(self._sums)

    def unverified(self, shards: npt.NDArray[Any], begins: npt.NDArray[Any], n_bytes: int) -> npt.NDArray[np.bool_]:
        """Returns which of the ranges touch a block that is not verified, (n,) bool.

        Args:
            shards: Number of the shard of each range, (n,).
            begins: Offset of each range in its file in bytes, (n,).
            n_bytes: Length of every range; a range lies within its file.
        """
        first = self._first[shards] + begins // BLOCK_BYTES
        last = self._first[shards] + (begins + n_bytes - 1) // BLOCK_BYTES
        found = ~(self._verified[first] & self._verified[last])
        if n_bytes > BLOCK_BYTES:  # blocks between the first and the last one
            for i in np.flatnonzero(~found):
                found[i] = not self._verified[first[i] : last[i] + 1].all()
        return found

    def verify(self, fd: int, shard: int, begin: int, end: int, where: Path) -> None:
        """Verifies the blocks of the shard file `fd` that the bytes [begin, end) touch, each once in this process.

        Raises:
            DataError: A block is not the one that was written; the message names shard, offset and remedy.
        """
        base = int(self._first[shard])
        for block in range(begin // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
            if self._verified[base + block]:
                continue
            start = block * BLOCK_BYTES
            data = _read_bytes(fd, start, min(start + BLOCK_BYTES, self._shards[shard].bytes))
            self.read_bytes += len(data)
            if zlib.crc32(data) != self._sums[base + block]:
                raise DataError(
                    f"{where}: found wrong bytes in [{start}, {start + len(data)}), which do not match the checksum: "
                    "the shard is corrupt; copy this file again from its source, or prepare the data set again"
                )
            self._verified[base + block] = True

    def locate(self, block: int) -> tuple[int, int, int]:
        """Returns shard, begin and end in bytes of a block, counted over the split."""
        shard = int(np.searchsorted(self._first, block, side="right")) - 1
        begin = (block - int(self._first[shard])) * BLOCK_BYTES
        return shard, begin, min(begin + BLOCK_BYTES, self._shards[shard].bytes)


def _read_bytes(fd: int, begin: int, end: int) -> bytes:
    """Returns the bytes [begin, end) of a file, or fewer if the file is shorter."""
    data = os.pread(fd, end - begin, begin)
    while len(data) < end - begin and (more := os.pread(fd, end - begin - len(data), begin + len(data))):
        data += more
    return data
