"""Sources of text: files, folders, the standard library, tiny Shakespeare and Hugging Face data sets.

A source yields its documents one by one as UTF-8 bytes.
"""

import codecs
import hashlib
import importlib
import json
import os
import platform
import shlex
import stat
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptperf.data.hub import by_hand
from gptperf.errors import DataError, DeviceError
from gptperf.files import replacing

__all__ = [
    "HUGGING_FACE",
    "KNOWN",
    "SHAKESPEARE_SHA256",
    "SHAKESPEARE_URL",
    "Skipped",
    "character_start",
    "download_shakespeare",
    "folder_documents",
    "hub_documents",
    "jsonl_documents",
    "not_text",
    "parse_hub_name",
    "python_stdlib",
    "python_version",
    "text_pieces",
]

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
HUGGING_FACE: dict[str, tuple[str, str | None]] = {
    "openwebtext": ("Skylion007/openwebtext", None),
    "fineweb_edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "slimpajama_627b": ("cerebras/SlimPajama-627B", None),
}
"""Name of a data set -> its repository and configuration on the Hugging Face hub; the text is in the field "text"."""
KNOWN = ("python_stdlib", "shakespeare", *HUGGING_FACE)
"""Names of the data sets that are prepared by name instead of by path."""
_PIECE_BYTES = 1 << 24
_STDLIB_WITHOUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}

_PANDAS = "python -c \"import pandas; pandas.{}('FILE').to_json('JSONL', orient='records', lines=True)\""
_FORMATS: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "gzip", "gzip -dc FILE > NEW"),
    (b"\x28\xb5\x2f\xfd", "zstd", "zstd -dc FILE > NEW"),
    (b"\xfd7zXZ\0", "xz", "xz -dc FILE > NEW"),
    (b"BZh", "bzip2", "bzip2 -dc FILE > NEW"),
    (b"\x04\x22\x4d\x18", "lz4", "lz4 -dc FILE > NEW"),
    (b"PK\x03\x04", "zip", "python -m zipfile -e FILE FOLDER"),
    (b"7z\xbc\xaf\x27\x1c", "7-Zip", "7z x FILE -oFOLDER"),
    (b"Rar!", "rar", "unrar x FILE FOLDER/"),
    (b"PAR1", "Parquet", _PANDAS.format("read_parquet")),
    (b"ARROW1", "Arrow", _PANDAS.format("read_feather")),
    (b"%PDF-", "PDF", "pdftotext FILE NEW"),
    (b"SQLite format 3\0", "SQLite", "sqlite3 FILE .dump > NEW"),
    (b"\xd0\xcf\x11\xe0", "old Microsoft Office", "libreoffice --headless --convert-to txt:Text FILE"),
    (b"\xff\xfe\0\0", "UTF-32", "iconv -f UTF-32 -t UTF-8 FILE > NEW"),
    (b"\xff\xfe", "UTF-16", "iconv -f UTF-16 -t UTF-8 FILE > NEW"),
    (b"\xfe\xff", "UTF-16", "iconv -f UTF-16 -t UTF-8 FILE > NEW"),
    (b"\x93NUMPY", "NumPy", ""),
    (b"\x89HDF", "HDF5", ""),
    (b"\x89PNG", "PNG", ""),
    (b"\xff\xd8\xff", "JPEG", ""),
    (b"\x7fELF", "executable", ""),
)
"""First bytes of a file that is not text, its format, and the command that makes text of it. FILE stands for the file,
and NEW, JSONL or FOLDER for what the command makes."""
_TAR_AT = 257
_COMPRESSED = (".gz", ".tgz", ".zst", ".xz", ".bz2", ".lz4")

Skipped = dict[str, int]
"""Reason -> number of files that were skipped for it."""


def python_version() -> str:
    """Returns the name and version of the running Python, such as "CPython 3.11.7"."""
    return f"{platform.python_implementation()} {platform.python_version()}"


def python_stdlib(skipped: Skipped) -> Iterator[bytes]:
    """Yields the .py files of the running Python's standard library, without its tests, sorted by relative path."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in _files(root, without_names=_STDLIB_WITHOUT):
        if path.suffix == ".py":
            yield from _text_document(path, skipped)


def folder_documents(root: Path, skipped: Skipped, without: Path) -> Iterator[bytes]:
    """Yields the text files under `root`, sorted by relative path.

    Hidden, empty and binary files are counted in `skipped`. The folder `without`, where data sets are written, is
    not entered.
    """
    for path in _files(root, skipped=skipped, without=without.resolve()):
        yield from _text_document(path, skipped)


def jsonl_documents(path: Path, field: str = "text") -> Iterator[bytes]:
    """Yields one field of each line of a JSON lines file.

    Raises:
        DataError: A line is not a JSON object with a string in that field.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: not valid JSON ({error})") from error
            yield _text_field(record, field, f"{path}:{number}")


def text_pieces(path: Path, begin: int, end: int) -> Iterator[bytes]:
    """Yields the bytes [begin, end) of a UTF-8 text in pieces of about 16 MB, each of which ends with a whole line.

    A line of more than 16 MB is not split.

    Raises:
        DataError: The text is not UTF-8, or the file shrank.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest = b""
    with path.open("rb") as file:
        file.seek(begin)
        while begin < end:
            data = file.read(min(_PIECE_BYTES, end - begin))
            if not data:
                raise DataError(f"{path}: the file shrank while it was read")
            begin += len(data)
            try:
                decoder.decode(data, final=begin == end)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}: found bytes that are not UTF-8 near offset {begin - len(data) + error.start}, wanted a "
                    "text; if its encoding is Latin-1, for example, convert it: "
                    + _with_names("iconv -f LATIN1 -t UTF-8 FILE > NEW", path)
                ) from error
            if b"\0" in data:
                raise DataError(
                    f"{path}: found a zero byte at offset {begin - len(data) + data.index(0)}, wanted a text; if it is "
                    "UTF-16, convert it: " + _with_names("iconv -f UTF-16LE -t UTF-8 FILE > NEW", path)
                )
            cut = len(data) if begin == end else data.rfind(b"\n") + 1
            if cut:
                yield rest + data[:cut]
                rest = data[cut:]
            else:
                rest += data
    if rest:
        yield rest


def not_text(path: Path) -> str | None:
    """Returns the format of a file that is not text, with the command that makes text of it; None for all others."""
    with path.open("rb") as file:
        start = file.read(_TAR_AT + 5)
    name, command = _format(start)
    if name is None:
        return None
    remedy = f"; make a text of it: {_with_names(command, path)}" if command else ""
    return f"{path}: found {name} data, wanted text{remedy}"


def _format(start: bytes) -> tuple[str | None, str]:
    """Returns the format that the first bytes of a file are of, and the command that makes text of it."""
    if start[_TAR_AT:] == b"ustar":
        return "tar", "mkdir -p FOLDER && tar -xf FILE -C FOLDER"
    return next(((name, command) for magic, name, command in _FORMATS if start.startswith(magic)), (None, ""))


def _with_names(command: str, path: Path) -> str:
    """Returns a command for a file, in which every name is quoted for the shell."""
    new = path.with_suffix("") if path.suffix in _COMPRESSED else path.with_name(f"{path.name}.txt")
    if new.suffix in ("", *_COMPRESSED):
        new = new.with_name(f"{new.name}.txt")
    names = {
        "FILE": path,
        "NEW": new,
        "JSONL": path.with_suffix(".jsonl"),
        "FOLDER": path.with_name(f"{path.stem}.files"),
    }
    for word, name in names.items():
        command = command.replace(f"'{word}'", repr(str(name))).replace(word, shlex.quote(str(name)))
    return command


def character_start(path: Path, offset: int) -> int:
    """Returns the offset of the UTF-8 character that holds the byte `offset`: at most 3 less, and at least 1."""
    begin = max(1, offset - 3)
    with path.open("rb") as file:
        file.seek(begin)
        data = file.read(offset - begin + 1)
    for back in range(len(data)):
        if data[len(data) - 1 - back] & 0xC0 != 0x80:
            return offset - back
    return offset


def download_shakespeare(url: str, data_dir: str | os.PathLike[str]) -> Path:
    """Downloads tiny Shakespeare to `data_dir`/.downloads, unless the file exists, and returns its path.

    Raises:
        DataError: The text cannot be downloaded, or its SHA-256 is not `SHAKESPEARE_SHA256`.
        DiskError: The text cannot be written.
    """
    target = Path(data_dir) / ".downloads" / "shakespeare.txt"
    if target.is_file() and hashlib.sha256(target.read_bytes()).hexdigest() == SHAKESPEARE_SHA256:
        return target
    remedy = f"fetch the text by other means as {target}, or run: python -m gptperf.prepare PATH --name=shakespeare"
    try:
        with urllib.request.urlopen(url, timeout=30) as reply:
            data = reply.read(1 << 24)
    except (OSError, ValueError) as error:  # a URLError is an OSError; a malformed URL raises ValueError
        raise DataError(f"shakespeare: cannot download {url} ({error}); {remedy}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != SHAKESPEARE_SHA256:
        raise DataError(
            f"shakespeare: found SHA-256 {found} ({len(data)} bytes) at {url}, wanted {SHAKESPEARE_SHA256}; {remedy}"
        )
    with replacing(target) as temporary:
        temporary.write_bytes(data)
    return target


def parse_hub_name(what: str) -> tuple[str, str | None]:
    """Splits "hf:REPO[:CONFIG]" into repository and configuration.

    Raises:
        DataError: The name has no repository.
    """
    repo, _, config = what.removeprefix("hf:").partition(":")
    if not repo:
        raise DataError(f"prepare: found {what!r}, wanted hf:REPO or hf:REPO:CONFIG, e.g. hf:roneneldan/TinyStories")
    return repo, config or None


def hub_documents(repo: str, config: str | None, split: str = "train", field: str = "text") -> Iterator[bytes]:
    """Streams a split of a Hugging Face data set and yields one field of each record.

    Raises:
        DeviceError: The package `datasets`, or a package that it needs, is not installed.
        DataError: The data set cannot be reached, does not exist, or has no such split or field.
    """
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise DeviceError(
            f"hf:{repo} needs the package datasets, which is not installed: pip install 'gptperf[hf]'"
        ) from error
    try:
        records = datasets.load_dataset(repo, config, split=split, streaming=True)
        for number, record in enumerate(records):
            yield _text_field(record, field, f"hf:{repo} record {number}")
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        if "Compression type" in first_line:
            raise DeviceError(f"hf:{repo}: {first_line}: pip install 'gptperf[hf]'") from error
        raise DataError(
            f"hf:{repo}: cannot be read ({type(error).__name__}: {first_line}); check the network, and the names of "
            "the data set and its configuration. "
            + by_hand("the files", f"datasets/{repo}/tree/main", "use hf:FOLDER in place of the name")
        ) from error


def _text_field(record: object, field: str, where: str) -> bytes:
    """Returns a field of a record as UTF-8; `where` names the record in the error."""
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        strings = [key for key, value in record.items() if isinstance(value, str)] if isinstance(record, dict) else []
        hint = f"; nearest: --text_field={strings[0]}" if strings else ""
        raise DataError(f'{where}: found no string "{field}", wanted an object with one{hint}')
    return text.encode("utf-8", errors="replace")


def _files(
    root: Path,
    without_names: frozenset[str] | set[str] = frozenset(),
    skipped: Skipped | None = None,
    without: Path | None = None,
) -> list[Path]:
    """Returns the files below `root` that are not hidden, sorted by relative path."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and name not in without_names and Path(folder, name).resolve() != without
        ]
        for name in names:
            if not name.startswith("."):
                found.append(Path(folder, name))
            elif skipped is not None:
                _count(skipped, "hidden")
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _text_document(path: Path, skipped: Skipped) -> Iterator[bytes]:
    """Yields the content of a text file. Any other file yields nothing and is counted in `skipped`."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a FIFO would block
            _count(skipped, "not a regular file")
            return
        data = path.read_bytes()
    except OSError as error:
        _count(skipped, f"unreadable ({error.strerror})")
        return
    if not data:
        _count(skipped, "empty")
    elif not _is_text(data):
        name, _ = _format(data[: _TAR_AT + 5])
        _count(skipped, "binary or not UTF-8" if name is None else f"{name} data")
    else:
        yield data


def _is_text(data: bytes) -> bool:
    if b"\0" in data:
        return False
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _count(skipped: Skipped, reason: str) -> None:
    skipped[reason] = skipped.get(reason, 0) + 1
