"""Finds and reads a data set in the shard format (`format.py`), which `writer.py` writes.

Opening a split checks everything that does not take a pass over the tokens. Shards are read with `preadv` and are not
mapped: resident memory stays constant, and a shard that is truncated during a run raises an error instead of SIGBUS.
"""

import difflib
import errno
import hashlib
import os
import random
import resource
import stat
import threading
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from gptperf.data.blocks import BLOCK_BYTES, BlockChecksums, block_sum
from gptperf.data.format import DTYPES, HEADER_BYTES, MANIFEST, SPLITS, DatasetManifest, Header, Shard, read_manifest
from gptperf.data.sources import KNOWN
from gptperf.data.tokenizers import read_vocabulary
from gptperf.errors import DataError
from gptperf.formats import counted

__all__ = ["TokenSource", "resolve_dataset", "verify"]

MAX_OPEN_SHARDS = 512
"""Most files that one source keeps open, where the limit of the process (`ulimit -n`) allows four times as many. Other
shards are opened at each read."""


class _OpenFile:
    """A file descriptor that is closed when its last user drops it, so eviction cannot close it during a read."""

    __slots__ = ("fd",)

    def __init__(self, path: Path) -> None:
        self.fd = -1  # for __del__, if open raises
        self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO in place of a shard must not block

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class TokenSource:
    """The tokens of one split as one array on disk. Create an instance with `TokenSource.open`.

    Several threads may read at the same time. At most `MAX_OPEN_SHARDS` files are open, and at most a quarter of what
    the process may open; a shard that is opened again must be the same file (size, mtime, inode).

    Attributes:
        manifest: Manifest of the data set.
        path: Folder of the data set.
        split: "train" or "val".
        dtype: Little-endian uint16 or uint32.
        max_id: Largest token id of the split, from the headers.
        fingerprint: SHA-256 (hex) over the names, sizes, headers and checksums of the shards of the split.
        checksums: Checksums of the blocks, and which of them are verified; None without verification.
    """

    def __init__(self, manifest: DatasetManifest, path: Path, split: str, verify: bool = True) -> None:
        self.manifest = manifest
        self.path = path
        self.split = split
        self.dtype = DTYPES[manifest.dtype]
        self._shards = manifest.splits[split].shards
        self._ends = np.cumsum([shard.tokens for shard in self._shards], dtype=np.int64)
        self._begins = self._ends - np.array([shard.tokens for shard in self._shards], dtype=np.int64)
        self._tokens = manifest.splits[split].tokens
        self.checksums = BlockChecksums.read(manifest, path, split) if verify else None
        self._identity: list[tuple[int, int, int]] = []
        self._files: dict[int, _OpenFile] = {}
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most_open = MAX_OPEN_SHARDS if soft == resource.RLIM_INFINITY else max(1, min(MAX_OPEN_SHARDS, soft // 4))
        self._lock = threading.Lock()
        digest = hashlib.sha256(b"gptperf data set 1\n")
        for index, shard in enumerate(self._shards):
            header = self._check_shard(index)
            digest.update(f"{shard.file} {shard.bytes} {header.hex()} {shard.sha256}\n".encode())
        self.fingerprint = digest.hexdigest()
        self.max_id = max((shard.max_id for shard in self._shards), default=0)

    @classmethod
    def open(cls, path: str | os.PathLike[str], split: str, vocab_size: int | None = None, verify: bool = True) -> Self:
        """Opens the split `split` of the data set in the folder `path`, and checks the header of every shard.

        Args:
            path: Folder with `manifest.json`.
            split: "train" or "val".
            vocab_size: Vocabulary size of the model; None means the tokenizer's vocabulary size.
            verify: Whether a block is compared with its checksum before its first use.

        Raises:
            DataError: A shard is missing, has the wrong size, magic, version or dtype, or differs from the manifest;
                the split is empty; or a token id is not below `vocab_size`.
        """
        if split not in SPLITS:
            raise DataError(f"split: found {split!r}, wanted one of {', '.join(SPLITS)}")
        source = cls(read_manifest(path), Path(path), split, verify)
        if len(source) == 0:
            raise DataError(
                f"{Path(path) / MANIFEST}: the split {split!r} is empty, wanted at least one document; "
                "prepare the data set again, with --overwrite=True and another --val_fraction"
            )
        wanted = source.vocab_size if vocab_size is None else vocab_size
        for shard in source._shards:
            if shard.max_id >= wanted:
                raise DataError(
                    f"{Path(path) / shard.file}: found token id {shard.max_id}, wanted ids below "
                    f"vocab_size = {wanted}; the tokenizer {source.manifest.tokenizer.name!r} needs "
                    f"--vocab_size={max(source.vocab_size, shard.max_id + 1)}"
                )
        return source

    def __len__(self) -> int:
        """Returns the number of tokens."""
        return self._tokens

    @property
    def vocab_size(self) -> int:
        """Vocabulary size of the tokenizer that made the data."""
        return self.manifest.tokenizer.vocab_size

    def read_into(self, offset: int, out: npt.NDArray[Any]) -> None:
        """Fills `out`, (n,) of the source's dtype and contiguous, with the tokens from `offset` on.

        Raises:
            ValueError: The range is not within the source, or `out` has another dtype or layout.
            DataError: A shard was truncated or changed during the run, a block does not match its checksum, or a token
                id is above the maximum of the shard's header.
        """
        self._check_out(out, ndim=1)
        if not 0 <= offset <= self._tokens - len(out):
            raise ValueError(f"offset: found [{offset}, {offset + len(out)}), wanted within [0, {self._tokens})")
        self._fill(offset, out)
        self._check_ids(out)

    def read_rows(self, offsets: npt.NDArray[np.int64], out: npt.NDArray[Any]) -> None:
        """Fills row r of `out`, (R, W) of the source's dtype and contiguous, with the W tokens from `offsets[r]` on.

        It does the same as R calls of `read_into` and raises the same errors, with less work per row.
        """
        self._check_out(out, ndim=2)
        width = out.shape[1]
        if len(offsets) != len(out) or (
            len(offsets) and not (offsets.min() >= 0 and offsets.max() <= self._tokens - width)
        ):
            raise ValueError(f"offsets: wanted {len(out)} of them within [0, {self._tokens - width}]")
        shards = np.searchsorted(self._ends, offsets, side="right")
        within = offsets - self._begins[shards]
        spans = offsets + width > self._ends[shards]
        positions = HEADER_BYTES + within * self.dtype.itemsize
        row_bytes = width * self.dtype.itemsize
        if self.checksums is not None:
            whole = np.flatnonzero(~spans)
            for i in whole[self.checksums.unverified(shards[whole], positions[whole], row_bytes)]:
                self._verify(int(shards[i]), int(positions[i]), row_bytes)
        columns = (offsets.tolist(), shards.tolist(), positions.tolist(), spans.tolist())
        for row, offset, shard, position, spanning in zip(out, *columns, strict=True):
            if spanning or os.preadv(self._file(shard).fd, (row,), position) != row_bytes:
                self._fill(offset, row)  # several shards, or a short read, whose error `_fill` raises
        self._check_ids(out)

    def verify_share(self, rank: int, world_size: int) -> int:
        """Compares the share of one of `world_size` ranks with the checksums of the data set.

        The shares are ranges of blocks or, without checksums of blocks, whole shards with their SHA-256.

        Returns:
            Number of bytes that were compared.

        Raises:
            DataError: The data is not what was written; the message names the shard.
        """
        done = 0
        if self.checksums is None:
            for index in range(rank, len(self._shards), world_size):
                _verify_shard(self, self._shards[index], int(self._begins[index]))
                done += self._shards[index].bytes
            return done
        blocks = len(self.checksums)
        for block in range(rank * blocks // world_size, (rank + 1) * blocks // world_size):
            index, begin, end = self.checksums.locate(block)
            self._verify(index, begin, end - begin)
            done += end - begin
        return done

    def sampled_blocks(self, count: int) -> list[tuple[str, int]]:
        """Returns shard file and offset in bytes of up to `count` blocks, always the same ones for the same shards."""
        firsts = np.concatenate([[0], np.cumsum([-(-shard.bytes // BLOCK_BYTES) for shard in self._shards])])
        chosen = random.Random(self.fingerprint).sample(range(int(firsts[-1])), min(count, int(firsts[-1])))
        shards = np.searchsorted(firsts, chosen, side="right") - 1
        return [
            (self._shards[index].file, (block - int(firsts[index])) * BLOCK_BYTES)
            for block, index in sorted(zip(chosen, shards.tolist(), strict=True))
        ]

    def block_sum(self, file: str, begin: int) -> int:
        """Returns the CRC-32 of the block at the offset `begin` of a shard file, read now; an unknown file has 0."""
        index = next((i for i, shard in enumerate(self._shards) if shard.file == file), None)
        return 0 if index is None else block_sum(self._file(index).fd, begin)

    def close(self) -> None:
        """Closes the shards; a later read opens them again."""
        with self._lock:
            self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _check_out(self, out: npt.NDArray[Any], ndim: int) -> None:
        if out.dtype != self.dtype or out.ndim != ndim or not out.flags.c_contiguous:
            raise ValueError(
                f"out: found {out.dtype} with {out.ndim} dimensions, wanted contiguous {self.dtype} with {ndim}"
            )

    def _check_ids(self, out: npt.NDArray[Any]) -> None:
        # A corrupt token must not reach an embedding as an id out of range. This is one vectorised pass, 1% of a read.
        if out.size and int(out.max()) > self.max_id:
            raise DataError(
                f"{self.path}: found token id {int(out.max())} in the split {self.split!r}, wanted at most "
                f"{self.max_id}, the maximum of its headers: the data is corrupt; "
                "python -m gptperf.prepare NAME --verify finds the shard"
            )

    def _fill(self, offset: int, out: npt.NDArray[Any]) -> None:
        index = int(np.searchsorted(self._ends, offset, side="right"))
        done = 0
        while done < len(out):
            begin = offset + done - int(self._begins[index])
            count = min(len(out) - done, self._shards[index].tokens - begin)
            view = out[done : done + count].data.cast("B")
            position = HEADER_BYTES + begin * self.dtype.itemsize
            file = self._file(index)
            self._verify(index, position, len(view))
            while view:
                got = os.preadv(file.fd, (view,), position)
                if got == 0:
                    shard = self._shards[index]
                    found = counted(os.fstat(file.fd).st_size, "byte")
                    raise DataError(
                        f"{self.path / shard.file}: found {found}, wanted {shard.bytes:,}: the shard was truncated "
                        "during the run"
                    )
                view, position = view[got:], position + got
            done += count
            index += 1

    def _verify(self, index: int, position: int, n_bytes: int) -> None:
        """Verifies the blocks of the shard `index` that the bytes [position, position + n_bytes) touch."""
        if self.checksums is not None:
            where = self.path / self._shards[index].file
            self.checksums.verify(self._file(index).fd, index, position, position + n_bytes, where)

    def _file(self, index: int) -> _OpenFile:
        return self._files.get(index) or self._reopen(index)

    def _reopen(self, index: int) -> _OpenFile:
        file, identity = self._open_shard(index)
        if identity != self._identity[index]:
            raise DataError(f"{self.path / self._shards[index].file}: the shard changed during the run")
        self._keep(index, file)
        return file

    def _keep(self, index: int, file: _OpenFile) -> None:
        with self._lock:
            if len(self._files) >= self._most_open:
                self._files.pop(next(iter(self._files)))
            self._files[index] = file

    def _open_shard(self, index: int) -> tuple[_OpenFile, tuple[int, int, int]]:
        where = self.path / self._shards[index].file
        try:
            file = self._open_file(where)
        except OSError as error:
            raise DataError(f"{where}: {error.strerror}; the manifest names this shard") from error
        found = os.fstat(file.fd)
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{where}: this is not a regular file, wanted a shard")
        return file, (found.st_size, found.st_mtime_ns, found.st_ino)

    def _open_file(self, where: Path) -> _OpenFile:
        """Opens a shard; if the process has too many files open, it first closes the others and keeps fewer open."""
        try:
            return _OpenFile(where)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        with self._lock:
            self._most_open = max(1, len(self._files) // 2)
            self._files.clear()
        return _OpenFile(where)

    def _check_shard(self, index: int) -> bytes:
        shard, where = self._shards[index], self.path / self._shards[index].file
        file, identity = self._open_shard(index)
        data = os.pread(file.fd, HEADER_BYTES, 0)
        header = Header.unpack(data, where)
        if header.itemsize != self.dtype.itemsize:
            found = f"uint{8 * header.itemsize}"
            raise DataError(
                f"{where}: found dtype {found} in the header, wanted {self.manifest.dtype} (the manifest's)"
            )
        for key in ("tokens", "documents", "max_id"):
            if getattr(header, key) != getattr(shard, key):
                raise DataError(
                    f"{where}: found {key} = {getattr(header, key)} in the header, wanted {getattr(shard, key)} "
                    "(the manifest's)"
                )
        if identity[0] != shard.bytes:
            found, tokens = counted(identity[0], "byte"), counted(shard.tokens, "token")
            raise DataError(f"{where}: found {found}, wanted {shard.bytes:,} for {tokens}")
        self._identity.append(identity)
        if index < self._most_open:
            self._keep(index, file)
        return data


def verify(path: str | os.PathLike[str]) -> int:
    """Reads every file of the data set in the folder `path` and compares checksums and counts with the manifest.

    Returns:
        The number of tokens read.

    Raises:
        DataError: A checksum, largest id or number of documents differs, a file of the tokenizer does, or a check of
            `TokenSource.open` fails.
    """
    manifest = read_manifest(path)
    read_vocabulary(Path(path), manifest.tokenizer)
    for name in manifest.files:
        manifest.check_file(Path(path), name)
    total = 0
    for split in SPLITS:
        with TokenSource(manifest, Path(path), split, verify=False) as source:
            begin = 0
            for shard in manifest.splits[split].shards:
                _verify_shard(source, shard, begin)
                begin += shard.tokens
            total += begin
    return total


def _verify_shard(source: TokenSource, shard: Shard, begin: int) -> None:
    digest, max_id, documents = hashlib.sha256(), 0, 0
    buffer = np.empty(min(shard.tokens, 1 << 22), source.dtype)
    for done in range(0, shard.tokens, 1 << 22):
        tokens = buffer[: shard.tokens - done]
        source._fill(begin + done, tokens)
        digest.update(tokens.data)
        max_id = max(max_id, int(tokens.max()))
        documents += int(np.count_nonzero(tokens == source.manifest.tokenizer.eot))
    found = {"sha256": digest.hexdigest(), "max_id": max_id, "documents": documents}
    for key, value in found.items():
        if value != getattr(shard, key):
            raise DataError(
                f"{source.path / shard.file}: found {key} = {value} in its tokens, wanted {getattr(shard, key)} "
                "(the manifest's): the shard is corrupt; prepare the data set again"
            )


def resolve_dataset(dataset: str, data_dir: str | os.PathLike[str]) -> Path:
    """Returns the folder of the data set `dataset`: `data_dir`/`dataset`, or `dataset` itself as a path.

    Raises:
        DataError: Neither holds a data set; the message names the command that prepares it.
    """
    if os.sep not in dataset and os.path.isfile(Path(data_dir) / dataset / MANIFEST):
        return Path(data_dir) / dataset
    if os.path.isfile(Path(dataset) / MANIFEST):
        return Path(dataset)
    where = Path(dataset) if os.sep in dataset else Path(data_dir) / dataset
    prepared = sorted(folder.parent.name for folder in Path(data_dir).glob(f"[!.]*/{MANIFEST}"))
    near = difflib.get_close_matches(dataset, prepared, n=3, cutoff=0.4)
    if near:
        hint = f"nearest prepared: {', '.join(near)}"
    elif prepared:
        hint = f"prepared: {', '.join(prepared[:10])}"
    else:
        hint = f"nothing is prepared in {data_dir}"
    what = dataset if dataset in KNOWN else f"PATH --name={where.name}"
    if dataset not in KNOWN and os.path.isdir(where) and any(where.glob("*.bin")):  # token files of another trainer
        what = f"bin:{where} --name={where.name}-tokens --tokenizer=TOKENIZER"
    raise DataError(
        f"dataset: found no data set {dataset!r} at {where}; {hint}; to prepare it: "
        f"python -m gptperf.prepare {what} --data_dir={where.parent}"
    )
