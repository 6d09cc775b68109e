"""The document index of a data set: where each document of a split lies, and where its text came from.

`train_documents.bin` and `val_documents.bin` have a record of 40 bytes per document, in the order of the tokens.
`sources.txt` and `groups.txt` have a name per line, as JSON strings, and the records hold line numbers.
"""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from gptperf.data.format import DatasetManifest
from gptperf.errors import DataError
from gptperf.formats import counted

__all__ = ["RECORD", "DocumentIndex", "IndexWriter", "Origin", "bytes_per_token", "index_file"]

RECORD = np.dtype(
    [("end", "<u8"), ("offset", "<u8"), ("digest", "<u8"), ("source", "<u4"), ("group", "<u4"), ("bytes", "<u8")]
)
"""`end`: tokens of the split up to this document's `eot`, included. `digest`: the first 64 bits of the SHA-256 of the
text. `bytes`: length of the text in UTF-8. The other fields are those of `Origin`."""

SOURCES, GROUPS = "sources.txt", "groups.txt"


class Origin(NamedTuple):
    """Where the text of a document came from."""

    source: str
    """Path of the file relative to the prepared folder, or name of the remote data set."""
    offset: int = 0
    """Number of the record in its source, from 0, or the offset in bytes in a plain text."""
    group: str = ""
    """Documents of one group are in the same split."""


def index_file(split: str) -> str:
    """Returns the name of the file that has the records of a split."""
    return f"{split}_documents.bin"


class IndexWriter:
    """Writes the records of one split, and numbers the names of sources and groups.

    The tables of names are shared by the splits of a data set. The first `kept` records of an existing file stay.
    """

    def __init__(self, path: Path, sources: dict[str, int], groups: dict[str, int], kept: int = 0) -> None:
        self._file: BinaryIO = path.open("r+b" if kept else "wb", buffering=1 << 16)
        self._file.truncate(kept * RECORD.itemsize)
        self._file.seek(kept * RECORD.itemsize)
        self._sources = sources
        self._groups = groups

    def add(self, end: int, origin: Origin, digest: int, n_bytes: int) -> None:
        """Adds a document; the arguments are the fields of `RECORD`."""
        source, group = self.number(origin)
        self._file.write(np.array((end, origin.offset, digest, source, group, n_bytes), RECORD).tobytes())

    def number(self, origin: Origin) -> tuple[int, int]:
        """Returns the numbers of the names of source and group; new names get the next ones."""
        source = self._sources.setdefault(origin.source, len(self._sources))
        return source, self._groups.setdefault(origin.group, len(self._groups))

    def sync(self) -> None:
        """Writes the records to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Writes the records to the disk and closes the file."""
        self.sync()
        self._file.close()

    def abandon(self) -> None:
        """Closes the file of a data set that is not committed."""
        self._file.close()


def names_text(names: dict[str, int]) -> str:
    """Returns the text of `sources.txt` or `groups.txt`: the names in the order of their numbers."""
    return "".join(json.dumps(name) + "\n" for name in names)


class DocumentIndex:
    """The documents of one split of a data set.

    Attributes:
        records: Records of the documents, (n,) `RECORD`, mapped read-only.
    """

    def __init__(self, manifest: DatasetManifest, folder: Path, split: str) -> None:
        """Opens the index.

        Raises:
            DataError: The data set is of version 1, which has no index, or a file of the index is missing or corrupt.
        """
        path = folder / index_file(split)
        if path.name not in manifest.files:
            raise DataError(f"{folder}: this data set has no document index; prepare it again to make one")
        wanted = manifest.files[path.name].bytes
        if (
            not path.is_file()
            or path.stat().st_size != wanted
            or wanted != manifest.splits[split].documents * RECORD.itemsize
        ):
            raise DataError(
                f"{path}: found another size than {counted(wanted, 'byte')}, which the manifest states; prepare the "
                "data set again"
            )
        self.records: npt.NDArray[Any] = np.memmap(path, RECORD, "r") if wanted else np.empty(0, RECORD)
        self._sources = self._names(manifest, folder, SOURCES)
        self._groups = self._names(manifest, folder, GROUPS)

    @staticmethod
    def _names(manifest: DatasetManifest, folder: Path, name: str) -> list[str]:
        return [json.loads(line) for line in manifest.read_file(folder, name).decode().splitlines()]

    def __len__(self) -> int:
        """Returns the number of documents."""
        return len(self.records)

    def at(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Returns the number of the document that each token of the split belongs to, (n,) -> (n,)."""
        return np.searchsorted(self.records["end"], tokens.astype(np.uint64), side="right").astype(np.int64)

    def origin(self, document: int) -> Origin:
        """Returns where the text of a document came from."""
        record = self.records[document]
        return Origin(self._sources[int(record["source"])], int(record["offset"]), self._groups[int(record["group"])])


def bytes_per_token(manifest: DatasetManifest, folder: Path, split: str) -> float | None:
    """Returns the bytes of text of a token of a split, in the mean; None if the data set does not know its text.

    The tokens that end documents count, because a model predicts them; they have no bytes.

    Raises:
        DataError: A file of the document index is missing or corrupt.
    """
    if index_file(split) not in manifest.files:
        return None
    total = int(DocumentIndex(manifest, folder, split).records["bytes"].sum(dtype=np.uint64))
    return total / manifest.splits[split].tokens if total else None
