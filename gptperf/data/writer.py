"""Writes a data set in the shard format (`format.py`) as a stream; the data set is visible only when it is complete."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from gptperf.data.blocks import CHECKSUMS, block_sums
from gptperf.data.documents import GROUPS, RECORD, SOURCES, IndexWriter, Origin, index_file, names_text
from gptperf.data.format import (
    DTYPES,
    MANIFEST,
    SPLITS,
    DatasetManifest,
    FileInfo,
    Split,
)
from gptperf.data.split_writer import SplitWriter
from gptperf.data.tokenizers import Tokenizer, token_dtype, write_vocabulary
from gptperf.errors import DataError, DiskError
from gptperf.files import (
    adopt_temporary,
    keep_locked,
    make_temporary,
    remove_leftovers,
    replace_text,
    sync_directory,
    sync_file,
)

__all__ = ["SHARD_TOKENS", "ShardWriter", "SourceChangedError", "check_target"]

SHARD_TOKENS = 100_000_000
"""Default number of tokens in a shard: 200 MB of uint16, so 10 billion tokens are 100 files."""
_STATE = "progress.json"
"""File of an incomplete data set that says how far it is."""


class SourceChangedError(Exception):
    """The source is not the one from which a killed writer had written."""


class ShardWriter:
    """Writes one data set into a temporary folder, and renames the folder at the end.

    It is a context manager. Leaving it without an error syncs each file, then the folder, and renames the folder;
    leaving it with an error removes what was written, and entering it what killed processes have left in the parent
    folder. What was saved by `save` is kept in both cases: a writer with the same `key` goes on from there, with the
    same bytes at the end. The memory use is constant.

    Attributes:
        resumed: What the caller gave to the last `save` of the writer whose work goes on; None: there is none.

    Args:
        path: Folder of the data set; its last part is the name of the data set.
        tokenizer: Tokenizer of the ids. It determines the dtype and the `eot` that follows each document.
        source: Where the text came from, in words, for the manifest.
        val_fraction: Fraction of the validation split, 0 to 1, for the manifest.
        split_method: How the validation documents were chosen, in words, for the manifest.
        shard_tokens: Number of tokens in a full shard.
        overwrite: Whether an existing data set is replaced.
        key: What decides the content of the data set, but for the documents; None: the work is never taken up.

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
        key: Any = None,
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
        self._key = key
        self._saved = False
        self.resumed: Any = None
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._eot = np.array([tokenizer.eot], self._dtype)
        self._folder: Path | None = None
        self._locks = contextlib.ExitStack()
        self._splits: dict[str, SplitWriter] = {}
        self._indexes: dict[str, IndexWriter] = {}
        self._sources: dict[str, int] = {}
        self._groups: dict[str, int] = {}

    def __enter__(self) -> Self:
        remove_leftovers(self.path.parent, keep=lambda leftover: (leftover / _STATE).is_file())
        check_target(self.path, self._overwrite)
        with _disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            found = (
                None if self._key is None else adopt_temporary(self.path, lambda path: self._state(path) is not None)
            )
            self._folder, lock = found or make_temporary(self.path, folder=True)
            self._locks.callback(os.close, lock)
            remove_leftovers(self.path.parent, keep=self._is_work_of_others)
            state = self._state(self._folder) or {}
            self.resumed, self._saved = state.get("position"), bool(state)
            for split in SPLITS:
                part = state.get(split, {})
                self._splits[split] = SplitWriter(self._folder, split, self._dtype, self._shard_tokens, part)
                self._indexes[split] = IndexWriter(
                    self._folder / index_file(split), self._sources, self._groups, self._splits[split].total()[1]
                )
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
            if not self._saved or error is None or isinstance(error, SourceChangedError):
                shutil.rmtree(self._folder, ignore_errors=True)  # after a commit there is no such folder
            self._locks.close()

    def save(self, position: Any) -> None:
        """Saves the progress, so that after a kill a writer with the same key goes on from here.

        Args:
            position: Value of `resumed` for that writer; JSON must be able to represent it.
        """
        assert self._folder is not None
        with _disk_errors(self.path):
            for index in self._indexes.values():
                index.sync()
            splits = {split: part.state() for split, part in self._splits.items()}
            state = json.dumps({"key": self._key, "position": position} | splits)
            replace_text(self._folder / _STATE, state)
            self._saved = True

    def recall(self, origin: Origin) -> None:
        """Numbers the names of a document that had been written before."""
        for index in self._indexes.values():
            index.number(origin)

    def _state(self, folder: Path) -> dict[str, Any] | None:
        """Returns what was saved in a folder, or None if nothing was, if it has another key, or if it is damaged."""
        try:
            state = json.loads((folder / _STATE).read_bytes())
            if state["key"] != json.loads(json.dumps(self._key)):
                return None
            for split in SPLITS:
                if (folder / index_file(split)).stat().st_size < RECORD.itemsize * SplitWriter.check(
                    folder, split, state[split], self._dtype
                ):
                    return None
        except (OSError, ValueError, LookupError, TypeError):
            return None
        return dict(state)

    def _is_work_of_others(self, leftover: Path) -> bool:
        """Whether a leftover is the saved work on a data set of another name."""
        return not leftover.name.startswith(f".{self.path.name}.tmp-") and (leftover / _STATE).is_file()

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

    def tokens(self) -> int:
        """Returns the number of tokens written so far."""
        return sum(part.total()[0] for part in self._splits.values())

    def counts(self, split: str) -> tuple[int, int]:
        """Returns the numbers of tokens and documents written to the split "train" or "val" so far."""
        return self._splits[split].total()

    def _commit(self, folder: Path) -> None:
        (folder / _STATE).unlink(missing_ok=True)
        self._saved = False
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
        raise DataError(f"{path}: this data set exists; wanted another --name, or --overwrite=True to replace it")


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"{path}: cannot be written: {error.strerror or error}; free some space or choose another --data_dir"
        ) from error
