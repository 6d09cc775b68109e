"""Reads task files: recognises the format of a file by its fields, and checks every item."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptperf.data.readers import STRUCTURED, open_file, read_records, suffixes_of
from gptperf.data.text import byte_order_mark
from gptperf.errors import DataError
from gptperf.formats import counted
from gptperf.tasks.items import FORMATS, Fields, Item, Task

__all__ = ["load_tasks"]

_LINES = (".jsonl", ".ndjson", ".txt")
_NAMES = sorted({name for form in FORMATS.values() for names in form.fields for name in names} | {"choices", "label"})


def load_tasks(paths: Sequence[str | Path], most: int | None = None) -> list[Task]:
    """Reads task files, in their order.

    A file has a record a line (jsonl, ndjson), is a JSON array, CSV, TSV, Parquet or Arrow, or a text (txt) with a
    passage a line for its last word; each also as gz, xz or zst.

    Args:
        paths: The files.
        most: Largest number of items of each file; they are taken evenly over the file. None: all.

    Raises:
        DataError: A file cannot be read, has a record of no known format, or an item that cannot be scored.
        DeviceError: A package that reads the file is not installed.
    """
    found = [Path(path) for path in paths]
    stems = [path.name.partition(".")[0] for path in found]
    tasks: list[Task] = []
    for path, stem in zip(found, stems, strict=True):
        kind, items = _read(path)
        if most is not None and most < len(items):
            items = [items[i * len(items) // most] for i in range(most)]
        name = stem if stems.count(stem) == 1 else f"{path.absolute().parent.name}/{stem}"
        if any(task.name == name for task in tasks):
            raise DataError(f"{path}: found a second task of the name {name!r}, wanted another file name")
        tasks.append(Task(name, kind, tuple(items)))
    return tasks


def _read(path: Path) -> tuple[str, list[Item]]:
    """Returns kind and items of a file."""
    known, items, answers = "", [], None
    try:
        for where, record in _records(path):
            name = _format_of(record, where, known)
            if not known and name == "PIQA" and "label" not in record:
                answers = _labels(path)
            known = name
            if answers is not None:
                record = {**record, "label": next(answers, "no answer on this line")}
            items.append(FORMATS[name].read(Fields(where, record)))
        if answers is not None and next(answers, None) is not None:
            raise DataError(f"{_labels_path(path)}: found more labels than the {counted(len(items), 'item')} of {path}")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; wanted a task file") from error
    if not items:
        raise DataError(f"{path}: found no item, wanted one per line")
    return FORMATS[known].kind, items


def _format_of(record: Mapping[str, Any], where: str, known: str) -> str:
    """Returns the name of the format whose fields a record has.

    Args:
        record: The record.
        where: Its place.
        known: The format of the records before it, or "".

    Raises:
        DataError: No format fits, several do, or the format differs from the one of the records before it.
    """
    fits = [name for name, form in FORMATS.items() if any(fields <= record.keys() for fields in form.fields)]
    if len(fits) == 1 and known in ("", fits[0]):
        return fits[0]
    names = ", ".join(map(repr, list(record)[:12])) or "none"
    several = f", which are those of {' and '.join(fits)}" if len(fits) > 1 else ""
    what = f"those of {known}, as before it" if known else f"those of one format ({', '.join(FORMATS)})"
    sets = [(name, fields) for name, form in FORMATS.items() for fields in form.fields if name == known or not known]
    name, fields = max(sets, key=lambda one: len(one[1] & record.keys()) / len(one[1]))
    near = f"; nearest: {name}, which has {', '.join(sorted(fields))}" if fields & record.keys() or known else ""
    raise DataError(f"{where}: found the fields {names}{several}; wanted {what}{near}")


def _records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the place and the fields of every record of a file."""
    path.stat()
    kind = suffixes_of(path)[0]
    if kind in _LINES:
        for number, line in _lines(path):
            where = f"{path}:{number}"
            yield where, {"text": line} if kind == ".txt" else _object(line, where)
    elif kind in STRUCTURED:
        for number, record in enumerate(read_records(path, _NAMES)):
            yield f"{path}: record {number}", record
    else:
        raise DataError(f"{path}: found the suffix {kind!r}, wanted one of {', '.join((*_LINES, *STRUCTURED))}")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields number and text of every line that is not blank; a byte-order mark decides the encoding, else UTF-8."""
    with open_file(path) as file:
        data = file.read()
    mark, encoding = byte_order_mark(data[:4])
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        number = data[: len(mark) + error.start].decode(encoding, "ignore").count("\n") + 1
        raise DataError(f"{path}:{number}: not {encoding.upper()} ({error.reason})") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.removesuffix("\r")


def _object(line: str, where: str) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}); wanted one object per line") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: found a JSON {type(record).__name__}, wanted an object")
    return record


def _labels_path(path: Path) -> Path:
    return path.with_name(f"{path.name.partition('.')[0]}-labels.lst")


def _labels(path: Path) -> Iterator[str]:
    """Yields the lines of the file beside a file of PIQA that has its answers."""
    labels = _labels_path(path)
    try:
        lines = [line.strip() for _, line in _lines(labels)]
    except OSError as error:
        raise DataError(
            f"{path}: found no label in its records, wanted one there or in {labels}: {error.strerror}"
        ) from error
    return iter(lines)
