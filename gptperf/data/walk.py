"""Yields the documents of a file or of every file below a folder, in an order that depends on the names alone."""

import dataclasses
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from gptperf.data.documents import Origin
from gptperf.data.readers import STRUCTURED, Meter, Record, open_file, read_records, suffixes_in_name, suffixes_of
from gptperf.data.text import EMPTY, HEAD_BYTES, Document, Refused, Skipped, file_document, text_document
from gptperf.errors import DataError, DeviceError

__all__ = [
    "Fields",
    "check_format",
    "documents_of",
    "file_documents",
    "files_below",
    "folder_documents",
    "record_documents",
]

_ARCHIVES = {".zip", ".tar", ".7z", ".rar", ".bz2", ".lz4", ".whl", ".jar", ".tbz"}
_PATIENCE = 10_000
"""Records without a text after which a source has none."""
_UNREADABLE_FORMATS = {".ipynb": "Jupyter notebook", ".pdf": "PDF", ".docx": "Word", ".xlsx": "Excel", ".npy": "NumPy"}


@dataclasses.dataclass(frozen=True)
class Fields:
    """Fields of structured text."""

    text: str = "text"
    """Field that has the text of a document."""
    group: str | None = None
    """Field that has the group of a document; None: the group is ""."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the fields that are read."""
        return (self.text,) if self.group is None else (self.text, self.group)


def file_documents(
    path: Path, name: str, fields: Fields, skipped: Skipped, group: str = "", meter: Meter | None = None
) -> Iterator[Document]:
    """Yields the documents of one file: a whole text, or the records of structured text.

    Args:
        path: The file.
        name: Name of the source in the document index.
        fields: Fields of structured text.
        skipped: Counts the records that are no documents, by reason.
        group: Group of a whole text, and of records without `fields.group`.
        meter: Counts the bytes that are read.

    Raises:
        Refused: No text of the file can be read; the reason is one of a few.
        DataError: Structured text is corrupt.
        DeviceError: A package that reads the file is not installed.
        OSError: The file cannot be read.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):  # a FIFO would block
        raise Refused("not a regular file")
    with open(path, "rb", buffering=0) as file:
        head = file.read(HEAD_BYTES)
    kind, compression = suffixes_of(path, head)
    check_format(kind)
    if kind in STRUCTURED:
        yield from record_documents(read_records(path, fields.names, meter), name, fields, skipped, group)
        return
    # A small file is opened once: each call of the system lets other threads go on, for which this one then waits.
    # A network file system may return fewer bytes than there are.
    whole = head if not compression and found.st_size <= len(head) < HEAD_BYTES else None
    if whole is not None and meter is not None:
        meter.begin(None, len(whole))
    yield file_document(Origin(name, 0, group), lambda: open_file(path, meter, compression), whole)


def check_format(kind: str) -> None:
    """Raises `Refused` if files with the suffix `kind` are never read."""
    if kind in _ARCHIVES:
        raise Refused(f"format {kind}", "unpack it first")
    if kind in _UNREADABLE_FORMATS:
        raise Refused(f"format {kind}", f"{_UNREADABLE_FORMATS[kind]} is not read")


def record_documents(
    records: Iterable[Record], name: str, fields: Fields, skipped: Skipped, group: str = ""
) -> Iterator[Document]:
    """Yields the documents of records.

    Args:
        records: Records of one source.
        name: Name of the source.
        fields: Fields that are read.
        skipped: Counts the records that are no documents, by reason.
        group: Group of the documents without `fields.group`.

    Raises:
        Refused: There is no record, or none of them, or none of the first 10,000, has a text in the field.
        DataError: A record has no field `fields.group`.
    """
    number, without_text = -1, 0
    others: set[str] = set()
    for number, record in enumerate(records):
        text = record.pop(fields.text, None)
        if not isinstance(text, str):
            without_text += 1
            others.update(list(record)[: 20 - len(others)])
            if number + 1 == without_text == _PATIENCE:
                break
            continue
        if fields.group is not None:
            if fields.group not in (*record, fields.text):
                raise DataError(f"{name}, record {number}: found no field {fields.group!r}, which --group_by names")
            group = str(record.get(fields.group, text))
        try:
            document = text_document(Origin(name, number, group), text)
        except Refused as refused:
            skipped.add(f"record: {refused.reason}", f"{name}, record {number}")
            continue
        del text, record  # they may have hundreds of megabytes
        yield document
        del document
    if number < 0:
        raise Refused(EMPTY)
    if number + 1 == without_text:
        raise Refused(f"no text in the field {fields.text!r}", f"its fields are {', '.join(sorted(others)) or 'none'}")
    if without_text:
        skipped.add(f"record: no text in the field {fields.text!r}", name, without_text)


def folder_documents(
    root: Path,
    fields: Fields,
    skipped: Skipped,
    without: Path,
    meter: Meter | None = None,
    group: Callable[[Path], str] = lambda path: "",
) -> Iterator[Document]:
    """Yields the documents of the files below `root`, sorted by relative path.

    Files that are not read are counted in `skipped`. The folder `without`, where data sets are written, is not entered.
    `group` returns the group of a file.
    """
    yield from documents_of(root, files_below(root, skipped, without=without), fields, skipped, meter, group)


def documents_of(
    root: Path,
    paths: Iterable[Path],
    fields: Fields,
    skipped: Skipped,
    meter: Meter | None = None,
    group: Callable[[Path], str] = lambda path: "",
) -> Iterator[Document]:
    """Yields the documents of files below `root`; the arguments are those of `folder_documents`."""
    for path in paths:
        name = path.relative_to(root).as_posix()
        try:
            yield from file_documents(path, name, fields, skipped, group(path), meter)
        except Refused as refused:
            skipped.add(f"file: {refused.reason}", name)
        except OSError as error:
            skipped.add(f"file: unreadable ({error.strerror})", name)
        except DataError as error:
            skipped.add("file: corrupt, or not of the format that the name says", str(error))
        except DeviceError as error:
            if suffixes_in_name(path) == suffixes_of(path):
                raise
            # A cache or a checkpoint among the texts: nobody named it as data.
            skipped.add("file: first bytes of a format whose package is not installed", str(error))


def files_below(
    root: Path, skipped: Skipped, without_names: frozenset[str] = frozenset(), without: Path | None = None
) -> list[Path]:
    """Returns the files below `root` that are not hidden, sorted by relative path.

    A folder is entered once, however many links lead to it; so a link to a folder above ends nothing in a loop.

    Args:
        root: Folder where the walk begins.
        skipped: Counts the hidden and unreadable ones.
        without_names: Names of folders that are not entered.
        without: A folder that is not entered.
    """
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    excluded = _identity(without) if without is not None else None
    pending = [root]
    while pending:
        folder = pending.pop()
        identity = _identity(folder)
        if identity is None or identity in seen or identity == excluded:
            continue
        seen.add(identity)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            skipped.add(f"folder: unreadable ({error.strerror})", str(folder.relative_to(root)))
            continue
        for entry in entries:
            if entry.name.startswith("."):
                skipped.add("file or folder: hidden", str(Path(entry.path).relative_to(root)))
            elif not entry.is_dir():
                found.append(Path(entry.path))
            elif entry.name not in without_names:
                pending.append(Path(entry.path))
    return sorted(found, key=str)  # as by the relative path


def _identity(path: Path) -> tuple[int, int] | None:
    """Returns device and inode of a folder; None if it does not exist."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
