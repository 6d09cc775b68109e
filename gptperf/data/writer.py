"""Writes a data set in the shard format (`format.py`) as a stream; the data set is visible only when it is complete."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from gptperf.data.blocks import CHECKSUMS, block_sums
from gptperf.data.documents import GROUPS, SOURCES, IndexWriter, Origin, index_file, names_text
from gptperf.data.format import (
    DTYPES,
    HEADER_BYTES,
    MANIFEST,
    SPLITS,
    DatasetManifest,
    FileInfo,
    Header,
    Shard,
    Split,
)
from gptperf.data.tokenizers import Tokenizer, token_dtype, write_vocabulary
from gptperf.errors import DataError, DiskError
from gptperf.files import keep_locked, make_temporary, remove_leftovers, sync_directory, sync_file

__all__ = ["SHARD_TOKENS", "ShardWriter", "check_target"]

SHARD_TOKENS = 100_000_000
"""Default number of tokens in a shard: 200 MB of uint16, so 10 billion tokens are 100 files."""


class ShardWriter:
    """Writes one data set into a temporary folder, and renames the folder at the end.

    It is a context manager. Leaving it without an error syncs each file, then the folder, and renames the folder;
    leaving it with an error removes what was written, and entering it what killed processes have left in the parent
    folder. The memory use is constant.

    Args:
        path: Folder of the data set; its last part is the name of the data set.
        tokenizer: Tokenizer of the ids. It determines the dtype and the `eot` that follows each document.
        source: Where the text came from, in words, for the manifest.
        val_fraction: Fraction of the validation split, 0 to 1, for the manifest.
        split_method: How the validation documents were chosen, in words, for the manifest.
        shard_tokens: Number of tokens in a full shard.
        overwrite: Whether an existing data set is replaced.

    Raises:
        DataError: On entering or leaving: `path` exists and `overwrite` is false, or `path` is not a data set.
        DiskError: The disk is full or cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        tokenizer: Tokenizer,
        source: str,
        val_fraction: float,
        split_method: str,
        shard_tokens: int = SHARD_TOKENS,
        overwrite: bool = False,
    ) -> None:
        if shard_tokens < 1:
            raise DataError(f"shard_tokens: found {shard_tokens}, wanted at least 1")
        # Where the path is a link to another disk, the link stays, and the temporary folder is made beside its target.
        self.path = Path(path).resolve()
        self._name = Path(path).name
        self._tokenizer = tokenizer
        self._source = source
        self._val_fraction = val_fraction
        self._split_method = split_method
        self._shard_tokens = shard_tokens
        self._overwrite = overwrite
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._eot = np.array([tokenizer.eot], self._dtype)
        self._folder: Path | None = None
        self._locks = contextlib.ExitStack()
        self._splits: dict[str, _SplitWriter] = {}
        self._indexes: dict[str, IndexWriter] = {}
        self._sources: dict[str, int] = {}
        self._groups: dict[str, int] = {}

    def __enter__(self) -> Self:
        remove_leftovers(self.path.parent)
        check_target(self.path, self._overwrite)
        with _disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._folder, lock = make_temporary(self.path, folder=True)
            self._locks.callback(os.close, lock)
            for split in SPLITS:
                self._splits[split] = _SplitWriter(self._folder, split, self._dtype, self._shard_tokens)
                self._indexes[split] = IndexWriter(self._folder / index_file(split), self._sources, self._groups)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        assert self._folder is not None
        try:
            if error is None:
                with _disk_errors(self.path):
                    self._commit(self._folder)
        finally:
            for split in self._splits:
                self._splits[split].abandon()
                self._indexes[split].abandon()
            shutil.rmtree(self._folder, ignore_errors=True)  # after a commit there is no such folder
            self._locks.close()

    def add(
        self, split: str, tokens: npt.NDArray[Any], origin: Origin | None = None, digest: int = 0, n_bytes: int = 0
    ) -> None:
        """Adds one document, (n,) integer ids without `eot`, to the split "train" or "val".

        The other arguments are those of `end_document`.
        """
        self.append(split, tokens)
        self.end_document(split, origin, digest, n_bytes)

    def append(self, split: str, tokens: npt.NDArray[Any]) -> None:
        """Adds a part of a document, (n,) integer ids; `end_document` ends the document.

        Raises:
            ValueError: An id is not in the tokenizer's vocabulary, or is `eot`.
        """
        if len(tokens) == 0:
            return
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self._tokenizer.vocab_size:
            raise ValueError(f"tokens: found ids from {low} to {high}, wanted 0 to {self._tokenizer.vocab_size - 1}")
        if high >= self._tokenizer.eot and (tokens == self._tokenizer.eot).any():
            raise ValueError(f"tokens: found eot = {self._tokenizer.eot} inside a document, wanted end_document()")
        with _disk_errors(self.path):
            self._splits[split].append(tokens.astype(self._dtype, copy=False), high)

    def end_document(self, split: str, origin: Origin | None = None, digest: int = 0, n_bytes: int = 0) -> None:
        """Ends the current document of the split "train" or "val" with `eot`, and adds it to the index.

        Args:
            split: "train" or "val".
            origin: Where the text came from; None: the source of the data set.
            digest: First 64 bits of the SHA-256 of the text.
            n_bytes: Length of the text in UTF-8.
        """
        part = self._splits[split]
        with _disk_errors(self.path):
            part.append(self._eot, self._tokenizer.eot)
            self._indexes[split].add(part.total()[0], origin or Origin(self._source), digest, n_bytes)
        part.documents += 1

    def counts(self, split: str) -> tuple[int, int]:
        """Returns the numbers of tokens and documents written to the split "train" or "val" so far."""
        return self._splits[split].total()

    def _commit(self, folder: Path) -> None:
        splits = {name: writer.finish() for name, writer in self._splits.items()}
        files = self._finish_files(folder, splits)
        manifest = DatasetManifest(
            name=self._name,
            tokenizer=write_vocabulary(self._tokenizer, folder),
            dtype=next(name for name, dtype in DTYPES.items() if dtype == self._dtype),
            source=self._source,
            val_fraction=self._val_fraction,
            split_method=self._split_method,
            splits=splits,
            files=files,
        )
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        sync_file(folder / MANIFEST)
        sync_directory(folder)
        check_target(self.path, self._overwrite)  # again, because another process may have written it in the meantime
        if self.path.exists():
            # rename(2) does not replace a folder with entries. A crash between these two renames leaves both data sets
            # complete, the old one under the name `aside`, and `remove_leftovers` gives it its name back. The lock
            # keeps other processes from doing so now.
            self._locks.callback(os.close, keep_locked(self.path))
            aside = folder.with_name(folder.name.replace(".tmp-", ".old-"))
            self.path.rename(aside)
            try:
                folder.rename(self.path)
            except OSError:
                aside.rename(self.path)
                raise
            shutil.rmtree(aside, ignore_errors=True)
        else:
            folder.rename(self.path)
        sync_directory(self.path.parent)

    def _finish_files(self, folder: Path, splits: dict[str, Split]) -> dict[str, FileInfo]:
        """Writes the checksums and the document index, and returns their entries in the manifest."""
        for index in self._indexes.values():
            index.close()
        names = [shard.file for split in SPLITS for shard in splits[split].shards]
        sums = [block_sums(folder / name).tobytes() for name in names]
        contents = {
            CHECKSUMS: b"".join(sums),
            SOURCES: names_text(self._sources).encode(),
            GROUPS: names_text(self._groups).encode(),
        }
        for name, content in contents.items():
            (folder / name).write_bytes(content)
            sync_file(folder / name)
        return {name: _describe(folder / name) for name in (*contents, *map(index_file, SPLITS))}


def _describe(path: Path) -> FileInfo:
    with path.open("rb") as file:
        return FileInfo(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def check_target(path: Path, overwrite: bool) -> None:
    """Checks that a data set may be written to the folder `path`.

    Raises:
        DataError: `path` exists and `overwrite` is false, or `path` is not a data set.
    """
    if not os.path.lexists(path):
        return
    if not (path / MANIFEST).is_file():
        raise DataError(f"{path}: exists and is not a data set (it has no {MANIFEST}); it is never replaced")
    if not overwrite:
        raise DataError(f"{path}: this data set exists; to replace it: --overwrite=True, or choose another --name")


class _SplitWriter:
    """Writes the shards of one split. It has one open file, the counts of that file and its running checksum."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self._folder = folder
        self._split = split
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._shards: list[Shard] = []
        self._file: BinaryIO | None = None
        self._begin()

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
        self._shards.append(
            Shard(
                file=f"{self._split}_{len(self._shards):05d}.bin",
                tokens=self.tokens,
                documents=self.documents,
                max_id=self._max_id,
                bytes=HEADER_BYTES + self.tokens * self._dtype.itemsize,
                sha256=self._digest.hexdigest(),
            )
        )
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


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"{path}: cannot be written: {error.strerror or error}; free some space or choose another --data_dir"
        ) from error
