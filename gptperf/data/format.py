"""The shard format: the header of a shard and the manifest of a data set.

A data set is a folder with `manifest.json`, the shards `train_00000.bin`, `val_00000.bin`, ... and, except for bytes,
the folder `tokenizer` with the files that define the vocabulary. A shard is a header of 64 bytes and its tokens as
uint16 or uint32, all little-endian. The shards of a split, in the manifest's order, are one stream of tokens in which
the tokenizer's `eot` follows every document. A document may span shards. Beside the shards are `checksums.bin`
(`blocks.py`) and the document index (`documents.py`).

    offset  size  header field
         0     8  magic, b"GPTPERF\\0"
         8     4  format version
        12     4  dtype code, the bytes of a token: 2 uint16, 4 uint32
        16     8  tokens
        24     8  documents that end in this shard
        32     8  largest token id
        40    24  zeros

The `sha256` of a shard in the manifest covers its tokens only: the header is known only when the shard is complete, and
each of its fields is compared with the manifest.

Manifests of version 1, which have no `files`, are still read: their data sets have no block checksums and no index.
"""

import dataclasses
import hashlib
import json
import os
import re
import struct
from pathlib import Path
from typing import Any, Self

import numpy as np

from gptperf.errors import DataError
from gptperf.formats import counted

__all__ = [
    "DTYPES",
    "FORMAT",
    "FileInfo",
    "HEADER_BYTES",
    "Header",
    "MANIFEST",
    "DatasetManifest",
    "SCHEMA_VERSION",
    "SPLITS",
    "Shard",
    "Split",
    "TokenizerInfo",
    "read_manifest",
]

FORMAT = "gptperf-tokens"
SCHEMA_VERSION = 2
"""Version of the manifest that is written."""
_SHARD_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "val")
MAGIC = b"GPTPERF\0"
HEADER_BYTES = 64
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

_HEADER = struct.Struct("<8sIIQQQ24s")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_SHARD_NAME = re.compile(r"(train|val)_\d{5,}\.bin")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """The first 64 bytes of a shard."""

    itemsize: int
    """Bytes of a token."""
    tokens: int
    documents: int
    """Documents that end in this shard."""
    max_id: int
    """Largest token id."""

    def pack(self) -> bytes:
        """Returns the header's 64 bytes."""
        return _HEADER.pack(MAGIC, _SHARD_VERSION, self.itemsize, self.tokens, self.documents, self.max_id, b"")

    @classmethod
    def unpack(cls, data: bytes, where: Path) -> Self:
        """Reads the header of the shard `where` from its first bytes.

        Raises:
            DataError: The data is too short, or the magic, version, dtype code or padding is wrong.
        """
        if len(data) < HEADER_BYTES:
            raise DataError(
                f"{where}: found {counted(len(data), 'byte')}, wanted at least the {HEADER_BYTES} of a shard header"
            )
        magic, version, itemsize, tokens, documents, max_id, zeros = _HEADER.unpack(data[:HEADER_BYTES])
        if magic != MAGIC:
            raise DataError(f"{where}: found magic {magic!r}, wanted {MAGIC!r}: not a gptperf shard, or corrupt")
        if version != _SHARD_VERSION:
            raise DataError(f"{where}: found format version {version}, wanted {_SHARD_VERSION}")
        if itemsize not in (2, 4):
            raise DataError(f"{where}: found dtype code {itemsize}, wanted 2 (uint16) or 4 (uint32)")
        if any(zeros):
            raise DataError(
                f"{where}: found non-zero bytes in the header's padding (40..63), wanted zeros: it is corrupt"
            )
        return cls(itemsize=itemsize, tokens=tokens, documents=documents, max_id=max_id)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """A shard as the manifest describes it."""

    file: str
    tokens: int
    documents: int
    """Documents that end in this shard."""
    max_id: int
    """Largest token id."""
    bytes: int
    """Size of the file, with its header."""
    sha256: str
    """SHA-256 (hex) of the tokens, without the header."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """The training or the validation tokens of a data set."""

    tokens: int
    documents: int
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerInfo:
    """The tokenizer that made the token ids."""

    name: str
    vocab_size: int
    fingerprint: str
    eot: int
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    """Name -> SHA-256 (hex) of the files that define the vocabulary, in the folder `tokenizer`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileInfo:
    """A file of the data set that is not a shard: its size and its SHA-256 (hex)."""

    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetManifest:
    """The content of `manifest.json`."""

    name: str
    tokenizer: TokenizerInfo
    dtype: str
    source: str
    """Where the text came from, in words."""
    val_fraction: float
    split_method: str
    """How the validation documents were chosen, in words."""
    splits: dict[str, Split]
    files: dict[str, FileInfo] = dataclasses.field(default_factory=dict)
    """Name -> description of the files that are not shards; empty for version 1."""

    def check_file(self, folder: Path, name: str) -> None:
        """Compares one of `files` of the data set in `folder` with its size and checksum.

        Raises:
            DataError: The file is missing, cannot be read, or is not the one that was written.
        """
        wanted, path = self.files[name], folder / name
        try:
            with path.open("rb") as file:
                size, digest = os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; the manifest names this file") from error
        if size != wanted.bytes:
            raise DataError(
                f"{path}: found {counted(size, 'byte')}, wanted {wanted.bytes:,}; prepare the data set again"
            )
        if digest != wanted.sha256:
            raise DataError(f"{path}: found another SHA-256 than the manifest's: corrupt; prepare the data set again")

    def read_file(self, folder: Path, name: str) -> bytes:
        """Returns the content of one of `files`, after `check_file`."""
        self.check_file(folder, name)
        return (folder / name).read_bytes()

    def to_json(self) -> str:
        """Returns the text of `manifest.json`."""
        head = {"format": FORMAT, "schema_version": SCHEMA_VERSION}
        return json.dumps(head | dataclasses.asdict(self), indent=1) + "\n"


def read_manifest(path: str | os.PathLike[str]) -> DatasetManifest:
    """Reads and checks `manifest.json` of the data set in the folder `path`.

    Raises:
        DataError: The file is missing, is not JSON, has another format or schema, or lacks a valid field.
    """
    where = Path(path) / MANIFEST
    try:
        data = json.loads(where.read_bytes().decode("utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{where}: no such file; prepare a data set with python -m gptperf.prepare") from error
    except OSError as error:
        raise DataError(f"{where}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}); prepare the data set again") from error
    found = _get(data, "format", str, where)
    if found != FORMAT:
        raise DataError(f"{where}: format: found {found!r}, wanted {FORMAT!r}")
    version = _get(data, "schema_version", int, where)
    if not 1 <= version <= SCHEMA_VERSION:
        hint = "a newer gptperf wrote it" if version > SCHEMA_VERSION else "prepare the data set again"
        raise DataError(f"{where}: schema_version: found {version}, wanted 1 to {SCHEMA_VERSION}; {hint}")
    dtype = _get(data, "dtype", str, where)
    if dtype not in DTYPES:
        raise DataError(f"{where}: dtype: found {dtype!r}, wanted one of {', '.join(DTYPES)}")
    splits = _get(data, "splits", dict, where)
    if set(splits) != set(SPLITS):
        raise DataError(f"{where}: splits: found {sorted(splits)}, wanted {list(SPLITS)}")
    return DatasetManifest(
        tokenizer=_read_tokenizer(_get(data, "tokenizer", dict, where), where),
        dtype=dtype,
        splits={name: _read_split(_get(splits, name, dict, where), DTYPES[dtype], where) for name in SPLITS},
        name=_get(data, "name", str, where),
        source=_get(data, "source", str, where),
        val_fraction=_get(data, "val_fraction", float, where),
        split_method=_get(data, "split_method", str, where),
        files=_read_files(data, where) if version > 1 else {},
    )


def _read_tokenizer(data: dict[str, Any], where: Path) -> TokenizerInfo:
    data = {"files": {}} | data  # a data set that was prepared before its tokenizer travelled with it has none
    files = _get(data, "files", dict, where)
    for name in files:
        if not _FILE_NAME.fullmatch(name):
            raise DataError(f"{where}: tokenizer file: found {name!r}, wanted a plain file name")
        _get(files, name, str, where)
    kinds = {"name": str, "vocab_size": int, "fingerprint": str, "eot": int, "files": dict}
    return TokenizerInfo(**{key: _get(data, key, kind, where) for key, kind in kinds.items()})


def _read_files(data: dict[str, Any], where: Path) -> dict[str, FileInfo]:
    files = {}
    for name, item in _get(data, "files", dict, where).items():
        if not _FILE_NAME.fullmatch(name):
            raise DataError(f"{where}: files: found {name!r}, wanted the name of a file in this folder")
        files[name] = FileInfo(**_fields(FileInfo, item, where))
    return files


def _read_split(data: dict[str, Any], dtype: np.dtype[Any], where: Path) -> Split:
    shards = []
    for item in _get(data, "shards", list, where):
        shard = Shard(**_fields(Shard, item, where))
        if not _SHARD_NAME.fullmatch(shard.file):
            raise DataError(f"{where}: shard file: found {shard.file!r}, wanted a name like train_00000.bin")
        size = HEADER_BYTES + shard.tokens * dtype.itemsize
        if shard.bytes != size:
            raise DataError(f"{where}: {shard.file}: found bytes = {shard.bytes}, wanted {size} for its tokens")
        shards.append(shard)
    split = Split(
        tokens=_get(data, "tokens", int, where),
        documents=_get(data, "documents", int, where),
        shards=tuple(shards),
    )
    for key in ("tokens", "documents"):
        total = sum(getattr(shard, key) for shard in shards)
        if getattr(split, key) != total:
            raise DataError(f"{where}: {key}: found {getattr(split, key)} in a split, wanted {total} as in its shards")
    return split


def _fields(cls: type, data: Any, where: Path) -> dict[str, Any]:
    return {field.name: _get(data, field.name, field.type, where) for field in dataclasses.fields(cls)}


def _get(data: Any, key: str, kind: Any, where: Path) -> Any:
    if not isinstance(data, dict):
        raise DataError(f"{where}: found {type(data).__name__}, wanted an object with the key {key!r}")
    if key not in data:
        raise DataError(f"{where}: the key {key!r} is missing; prepare the data set again")
    value = data[key]
    valid = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
    if not valid or (kind is int and value < 0):
        wanted = "a count" if kind is int else f"a {kind.__name__}"
        raise DataError(f"{where}: {key}: found {value!r}, wanted {wanted}")
    return value
