"""Sources of text by name, the standard library, tiny Shakespeare and Hugging Face data sets, and files of no use.

A source yields its documents (`text.py`) one by one.
"""

import hashlib
import importlib
import os
import platform
import shlex
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gptperf.data.hub import by_hand
from gptperf.data.readers import Meter, Record, open_file, suffixes_of
from gptperf.data.text import BINARY, Document, Refused, Skipped
from gptperf.data.walk import Fields, documents_of, files_below, record_documents
from gptperf.errors import DataError, DeviceError
from gptperf.files import replacing

__all__ = [
    "HUGGING_FACE",
    "KNOWN",
    "SHAKESPEARE_SHA256",
    "SHAKESPEARE_URL",
    "download_shakespeare",
    "hub_documents",
    "not_text",
    "parse_hub_name",
    "python_stdlib",
    "python_stdlib_files",
    "python_version",
    "refusal",
    "stdlib_folder",
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
_STDLIB_WITHOUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"})

_FORMATS: tuple[tuple[bytes, str, str], ...] = (
    (b"BZh", "bzip2", "bzip2 -dc FILE > NEW"),
    (b"\x04\x22\x4d\x18", "lz4", "lz4 -dc FILE > NEW"),
    (b"PK\x03\x04", "zip", "python -m zipfile -e FILE FOLDER"),
    (b"7z\xbc\xaf\x27\x1c", "7-Zip", "7z x FILE -oFOLDER"),
    (b"Rar!", "rar", "unrar x FILE FOLDER/"),
    (b"%PDF-", "PDF", "pdftotext FILE NEW"),
    (b"SQLite format 3\0", "SQLite", "sqlite3 FILE .dump > NEW"),
    (b"\xd0\xcf\x11\xe0", "old Microsoft Office", "libreoffice --headless --convert-to txt:Text FILE"),
    (b"\x93NUMPY", "NumPy", ""),
    (b"\x89HDF", "HDF5", ""),
    (b"\x89PNG", "PNG", ""),
    (b"\xff\xd8\xff", "JPEG", ""),
    (b"\x7fELF", "executable", ""),
)
"""First bytes of a file that is not text, its format, and the command that makes text of it. FILE stands for the file,
and NEW or FOLDER for what the command makes."""
_TAR_AT = 257
_COMPRESSED = (".gz", ".tgz", ".zst", ".xz", ".bz2", ".lz4")


def python_version() -> str:
    """Returns the name and version of the running Python, such as "CPython 3.11.7"."""
    return f"{platform.python_implementation()} {platform.python_version()}"


def stdlib_folder() -> Path:
    """Returns the folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def python_stdlib_files(skipped: Skipped) -> list[Path]:
    """Returns the .py files of the standard library, without its tests, sorted by relative path."""
    return [path for path in files_below(stdlib_folder(), skipped, _STDLIB_WITHOUT) if path.suffix == ".py"]


def python_stdlib(skipped: Skipped, meter: Meter, group: Callable[[Path], str]) -> Iterator[Document]:
    """Yields the documents of `python_stdlib_files`."""
    yield from documents_of(stdlib_folder(), python_stdlib_files(Skipped()), Fields(), skipped, meter, group)


def not_text(path: Path) -> str | None:
    """Returns what a file holds that no reader reads, with the command that makes text of it; None for all others."""
    with open_file(path) as file:
        start = file.read(_TAR_AT + 5)
    name, command = _format(start)
    if name is None:
        return None
    remedy = f"; make a text of it: {_with_names(command, path)}" if command else ""
    return f"{path}: found {name} data, wanted text{remedy}"


def refusal(path: Path, refused: Refused) -> DataError:
    """Returns the error of a single file that was refused, with the command that makes text of it if one is known."""
    reason, hint = refused.reason, "wanted a text"
    if reason == BINARY:
        reason = "a zero byte"
        hint += "; if it is UTF-16, convert it: iconv -f UTF-16LE -t UTF-8 FILE > NEW"
    elif reason.startswith("not UTF"):
        reason = f"bytes that are {reason}"
        hint += "; if its encoding is Latin-1, for example, convert it: iconv -f LATIN1 -t UTF-8 FILE > NEW"
    elif reason.startswith("no text in the field"):
        hint = "wanted another field: --text_field=NAME"
    if suffixes_of(path)[1]:
        hint = hint.replace("convert it: ", "decompress and convert it: ")
    detail = f" {refused.detail}" if refused.detail.startswith("at ") else refused.detail and f" ({refused.detail})"
    return DataError(f"{path}: found {reason}{detail}, {_with_names(hint, path)}")


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
        "FOLDER": path.with_name(f"{path.stem}.files"),
    }
    for word, name in names.items():
        command = command.replace(f"'{word}'", repr(str(name))).replace(word, shlex.quote(str(name)))
    return command


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


def hub_documents(repo: str, config: str | None, split: str, fields: Fields, skipped: Skipped) -> Iterator[Document]:
    """Streams a split of a Hugging Face data set and yields the documents of its records.

    Raises:
        DeviceError: The package `datasets`, or a package that it needs, is not installed.
        DataError: The data set cannot be reached, does not exist, or has no such split or field.
    """
    try:
        yield from record_documents(_hub_records(repo, config, split), f"hf:{repo}", fields, skipped)
    except Refused as refused:
        raise DataError(f"hf:{repo}: found {refused}, wanted text; another field: --text_field=NAME") from refused


def _hub_records(repo: str, config: str | None, split: str) -> Iterator[Record]:
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise DeviceError(
            f"hf:{repo} needs the package datasets, which is not installed: pip install 'gptperf[hf]'"
        ) from error
    try:
        yield from datasets.load_dataset(repo, config, split=split, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        if "Compression type" in first_line:
            raise DeviceError(f"hf:{repo}: {first_line}: pip install 'gptperf[hf]'") from error
        raise DataError(
            f"hf:{repo}: cannot be read ({type(error).__name__}: {first_line}); check the network, and the names of "
            "the data set and its configuration. "
            + by_hand("the files", f"datasets/{repo}/tree/main", "use FOLDER in place of the name")
        ) from error
