"""Reads the records of a file of structured text: JSON lines, JSON, CSV, TSV, Parquet and Arrow, compressed or not.

A reader raises `DataError` for a file that is corrupt or not of its format, with the place; it never guesses.
"""

import contextlib
import csv
import gzip
import importlib
import io
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from gptperf.data.text import byte_order_mark
from gptperf.errors import DataError, DeviceError
from gptperf.formats import counted

__all__ = ["STRUCTURED", "Meter", "Record", "open_file", "read_records", "suffixes_in_name", "suffixes_of"]

Record = dict[str, Any]
"""Field -> value."""
_MAX_RECORD_BYTES = 200 << 20
"""Characters of the largest record that is read. To parse it takes up to 1.9 GB of memory, if one is an emoji."""
_READ_BYTES = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
_BATCH_ROWS = 256


class Meter:
    """Counts the bytes on disk that were read, of all files that are opened with it."""

    def __init__(self) -> None:
        self._done = 0
        self._raw: IO[bytes] | None = None
        self._size = 0

    def begin(self, raw: IO[bytes] | None, size: int) -> None:
        """Begins a file of `size` bytes; None: it is read as a whole."""
        self.end()
        self._raw, self._size = raw, size

    def end(self) -> None:
        """Counts the file that was begun as read."""
        self._done, self._raw, self._size = self._done + self._size, None, 0

    def read(self) -> int:
        """Returns the bytes read so far; a file that is read twice counts once."""
        inside = self._size
        if self._raw is not None and not self._raw.closed:
            inside = min(self._raw.tell(), self._size)
        return self._done + inside


def suffixes_in_name(path: Path) -> tuple[str, str]:
    """Returns what the name alone says of `suffixes_of`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in _COMPRESSIONS else ""
    return suffixes[-1] if suffixes else "", compression


def suffixes_of(path: Path, head: bytes | None = None) -> tuple[str, str]:
    """Returns the suffixes of a file's format and of its compression in lower case, such as (".jsonl", ".gz").

    The second is "" for a file that is not compressed. What the name leaves open, the first bytes of the file say,
    which are `head` if they are read already.
    """
    kind, compression = suffixes_in_name(path)
    if not compression:
        if head is None:
            head = b""
            with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
                head = file.read(6)
        found = next((suffix for magic, suffix in _MAGIC if head.startswith(magic)), "")
        if found in _COMPRESSIONS:
            compression = found
        elif found:
            kind = found
    return kind, compression


@contextlib.contextmanager
def open_file(path: Path, meter: Meter | None = None, compression: str | None = None) -> Iterator[IO[bytes]]:
    """Opens the content of a file, decompressed, for the body of a `with`.

    Args:
        path: The file.
        meter: Counts the bytes that are read.
        compression: Its compression, if `suffixes_of` was asked already.

    Raises:
        DataError: In the body: the compressed file is truncated or corrupt.
        DeviceError: The package that decompresses the file is not installed.
        OSError: The file cannot be read.
    """
    compression = suffixes_of(path)[1] if compression is None else compression
    damage: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)
    with open(path, "rb") as raw:
        if meter is not None:
            meter.begin(raw, os.fstat(raw.fileno()).st_size)
        with _COMPRESSIONS[compression](raw) if compression else raw as file:
            if zstandard := sys.modules.get("zstandard"):
                damage = (*damage, zstandard.ZstdError)
            try:
                yield file
            except damage as error:
                raise DataError(
                    f"{path}: the compressed file is truncated or corrupt ({error}); fetch it again"
                ) from error


def read_records(path: Path, fields: Sequence[str], meter: Meter | None = None) -> Iterator[Record]:
    """Yields the records of a file of structured text.

    Args:
        path: A file whose format is in `STRUCTURED`.
        fields: Fields that are wanted; a columnar format reads only these.
        meter: Counts the bytes that are read.

    Raises:
        DataError: The file is corrupt, truncated or not of the format that its name says.
        DeviceError: A package that reads the file is not installed.
        OSError: The file cannot be read.
    """
    with open_file(path, meter) as file:
        yield from STRUCTURED[suffixes_of(path)[0]](file, path, fields)


def _json_lines(file: IO[bytes], path: Path, fields: Sequence[str]) -> Iterator[Record]:
    yield from _lines(_text(file), path)


def _lines(text: IO[str], path: Path) -> Iterator[Record]:
    number = 0
    while line := _readline(text, path, number + 1):
        number += 1
        record = None if line.isspace() else _json_object(line, f"{path}:{number}")
        del line  # it may have hundreds of megabytes, and so may its record
        if record is not None:
            yield record
        del record


def _readline(text: IO[str], path: Path, number: int, size: int | None = None) -> str:
    """Returns the next line, or its first `size` characters."""
    try:
        line = text.readline(_MAX_RECORD_BYTES + 1 if size is None else size)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: not {error.encoding.upper()} ({error.reason})") from error
    if len(line) > _MAX_RECORD_BYTES:
        raise DataError(f"{path}:{number}: found a line of more than {_MAX_RECORD_BYTES:,} characters, wanted fewer")
    return line


def _json_object(text: str, where: str) -> Record:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: found a JSON {type(record).__name__}, wanted an object")
    return record


def _json(file: IO[bytes], path: Path, fields: Sequence[str]) -> Iterator[Record]:
    """Reads an array of objects, one object, or JSON lines under the name .json, which is common."""
    text = _text(file)
    first = _readline(text, path, 1, _READ_BYTES)  # an array may be one line of any length
    while first and not first.strip():
        first = _readline(text, path, 1, _READ_BYTES)
    if first.lstrip().startswith("["):
        yield from _json_array(first.lstrip()[1:], text, path)
        return
    if not first.endswith("\n"):
        first += _readline(text, path, 1)
    record = None
    with contextlib.suppress(DataError):
        record = _json_object(first, str(path))
    if record is not None:
        yield record
        yield from _lines(text, path)
        return
    rest = _read(text, _MAX_RECORD_BYTES + 1, path)
    if len(first) + len(rest) > _MAX_RECORD_BYTES:
        raise DataError(f"{path}: found an object of more than {_MAX_RECORD_BYTES:,} characters, wanted JSON lines")
    yield _json_object(first + rest, str(path))


def _read(text: IO[str], size: int, path: Path) -> str:
    try:
        return text.read(size)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not {error.encoding.upper()} ({error.reason})") from error


def _json_array(text: str, file: IO[str], path: Path) -> Iterator[Record]:
    """Yields the objects of an array one by one, so that one object at a time is in memory.

    Args:
        text: The start of the file, behind the opening bracket.
        file: The rest of the file.
        path: Name of the file for errors.
    """
    decoder, number, at, size = json.JSONDecoder(), 0, 0, _READ_BYTES
    while True:
        at = _skip_space(text, at)
        problem = "the array does not end"
        if text.startswith("]", at):
            rest = (text[at + 1 :] + _read(file, 100, path)).strip()
            if rest:
                raise DataError(f"{path}: found {rest[:20]!r} after the array, wanted the end of the file")
            return
        if at < len(text):
            try:
                record, end = decoder.raw_decode(text, at)
                end = _skip_space(text, end)
            except RecursionError as error:
                raise DataError(f"{path}: element {number}: not valid JSON ({error})") from error
            except ValueError as error:  # the element may go on behind the text that was read
                problem, end = str(error), len(text)
            if end < len(text):
                if not isinstance(record, dict):
                    found = type(record).__name__
                    raise DataError(f"{path}: element {number}: found a JSON {found}, wanted an object")
                if text[end] not in ",]":
                    raise DataError(f"{path}: element {number}: found {text[end]!r} after it, wanted ',' or ']'")
                yield record
                number, size, at = number + 1, _READ_BYTES, end + (text[end] == ",")
                continue
        # To read twice as much each time keeps the work linear in the length of an element.
        more = _read(file, size, path) if len(text) - at <= _MAX_RECORD_BYTES else ""
        if not more:
            raise DataError(f"{path}: element {number}: not valid JSON ({problem})")
        text, at, size = text[at:] + more, 0, 2 * size


def _skip_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _delimited(delimiter: str) -> "Callable[[IO[bytes], Path, Sequence[str]], Iterator[Record]]":
    def read(file: IO[bytes], path: Path, fields: Sequence[str]) -> Iterator[Record]:
        csv.field_size_limit(_MAX_RECORD_BYTES)
        rows = csv.reader(_text(file), delimiter=delimiter, strict=True)
        header: list[str] = []
        try:
            header = next(rows, [])
            for row in rows:
                if len(row) == len(header):
                    yield dict(zip(header, row, strict=True))
                elif row:
                    found = counted(len(row), "field")
                    raise DataError(f"{path}:{rows.line_num}: found {found}, wanted {len(header)} as in the first line")
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}:{rows.line_num + 1}: not a valid table ({error})") from error

    return read


def _parquet(file: IO[bytes], path: Path, fields: Sequence[str]) -> Iterator[Record]:
    parquet = _import("pyarrow.parquet", path)
    with _arrow_errors(path):
        table = parquet.ParquetFile(_seekable(file, path))
        names = table.schema_arrow.names
        wanted = [name for name in names if name in fields]
        if not wanted:
            yield dict.fromkeys(names)  # a record without text, whose keys name the fields that there are
            return
        for batch in table.iter_batches(_BATCH_ROWS, columns=wanted, use_threads=False):
            yield from batch.to_pylist()


def _arrow(file: IO[bytes], path: Path, fields: Sequence[str]) -> Iterator[Record]:
    pyarrow, ipc = _import("pyarrow", path), _import("pyarrow.ipc", path)
    with _arrow_errors(path):
        file = _seekable(file, path)
        magic = file.read(6)
        file.seek(0)
        reader = ipc.open_file(file) if magic == b"ARROW1" else ipc.open_stream(file)
        names = reader.schema.names
        wanted = [name for name in names if name in fields]
        if not wanted:
            yield dict.fromkeys(names)
            return
        batches = (
            (reader.get_batch(i) for i in range(reader.num_record_batches)) if magic == b"ARROW1" else iter(reader)
        )
        for batch in batches:
            yield from pyarrow.RecordBatch.from_arrays([batch.column(name) for name in wanted], wanted).to_pylist()


@contextlib.contextmanager
def _arrow_errors(path: Path) -> Iterator[None]:
    pyarrow = importlib.import_module("pyarrow")
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise DataError(f"{path}: cannot be read as {suffixes_of(path)[0][1:]} ({first})") from error


def _seekable(file: IO[bytes], path: Path) -> IO[bytes]:
    """Returns the file itself, or the whole content of a compressed file, which has no seek from its end."""
    return io.BytesIO(file.read()) if suffixes_of(path)[1] else file


def _text(file: IO[bytes]) -> io.TextIOWrapper:
    """Returns a text stream in the encoding that the byte-order mark of the file stands for, without the mark."""
    head = file.read(4)
    mark, encoding = byte_order_mark(head)
    return io.TextIOWrapper(io.BufferedReader(_Chained(head[len(mark) :], file), _READ_BYTES), encoding, newline="")


class _Chained(io.RawIOBase):
    """The bytes of `head`, then those of a file."""

    def __init__(self, head: bytes, file: IO[bytes]) -> None:
        self._head = memoryview(head)
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head[: len(buffer)] or self._file.read(len(buffer))
        self._head = self._head[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)


class _Zstandard(io.RawIOBase):
    """The content of a Zstandard file of any number of frames; a truncated frame raises EOFError at its end."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._new = _import("zstandard", Path(getattr(raw, "name", ""))).ZstdDecompressor(max_window_size=1 << 31)
        self._frame: Any = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if self._frame is not None and self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
            self._input = self._input or self._raw.read(_READ_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the last frame is incomplete")
                return 0
            self._frame = self._frame or self._new.decompressobj()
            self._output, self._input = self._frame.decompress(self._input), b""
        data, self._output = self._output[: len(buffer)], self._output[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)


def _import(name: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise DeviceError(
            f"{path}: this file needs the package {package}, which is not installed: pip install 'gptperf[data]'"
        ) from error


_COMPRESSIONS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".xz": lzma.LZMAFile,
    ".zst": lambda raw: io.BufferedReader(_Zstandard(raw), _READ_BYTES),
}

_MAGIC = (
    (b"\x1f\x8b", ".gz"),
    (b"\xfd7zXZ\0", ".xz"),
    (b"\x28\xb5\x2f\xfd", ".zst"),
    (b"PAR1", ".parquet"),
    (b"ARROW1", ".arrow"),
)
"""First bytes of a file, and the suffix that it should have."""

STRUCTURED: dict[str, Callable[[IO[bytes], Path, Sequence[str]], Iterator[Record]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".parquet": _parquet,
    ".arrow": _arrow,
}
"""Suffix of a file -> its reader."""
