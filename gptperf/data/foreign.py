"""Converts token files of other trainers, which have ids already, to a data set.

Two formats are read, and what was recognised is printed:

- llm.c and modded-nanogpt: 256 int32 (magic 20240520 and version 1 for uint16, 20240801 and 7 for uint32; the number of
  tokens; zeros), then the tokens. `eot` precedes each document.
- nanoGPT: nothing but tokens, of a type that the caller knows. `eot` follows each document. Its `meta.pkl` is a pickle,
  which could run any code, and is never read.

The files of a split are one stream of tokens in the order of their names. No token is added or lost except `eot`: one
that precedes the first document is left out, and one that is missing after the last document is added.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptperf.data.documents import Origin
from gptperf.data.format import DTYPES, SPLITS
from gptperf.data.tokenizers import load_tokenizer
from gptperf.data.vocabulary import IDS, NoVocabularyError, Tokenizer, Tokens
from gptperf.data.writer import SHARD_TOKENS, ShardWriter, check_target
from gptperf.errors import DataError
from gptperf.formats import counted

__all__ = ["PREFIX", "convert"]

PREFIX = "bin:"
"""Begins the name of token files among the sources of text."""
_HEADER_BYTES = 1024
_MAGICS = {20240520: (1, "uint16"), 20240801: (7, "uint32")}
"""Magic -> version and type of the tokens."""
_CHUNK = 1 << 22
_HASH = "documents whose ids have a SHA-256 that falls below val_fraction"


class _File(NamedTuple):
    path: Path
    kind: str
    dtype: str
    begin: int
    """Bytes before the first token."""
    tokens: int


class _IdsOnly:
    """Ids without a vocabulary, of which nothing is known but their number."""

    files: Mapping[str, bytes] = {}

    def __init__(self, name: str, eot: str | None) -> None:
        count = name.removeprefix(IDS)
        if not count.isdecimal() or not 0 < int(count) < 1 << 24:
            raise DataError(f"--tokenizer: found {name!r}, wanted {IDS}N with the number of ids, such as {IDS}65")
        if eot is not None and (not eot.isdecimal() or int(eot) >= int(count)):
            raise DataError(f"--eot: found {eot!r}, wanted an id below {count}; nearest: --eot={int(count) - 1}")
        self.eot = int(count) if eot is None else int(eot)
        self.vocab_size = max(int(count), self.eot + 1)
        self.name = f"{IDS}{self.vocab_size}"
        self.fingerprint = hashlib.sha256(f"ids without a vocabulary {self.vocab_size} {self.eot}".encode()).hexdigest()

    def encode(self, text: bytes | str) -> Tokens:
        """Raises: there is no vocabulary."""
        raise NoVocabularyError(f"tokenizer {self.name!r} has no vocabulary")

    def decode(self, ids: Iterable[int] | Tokens) -> str:
        """Raises: there is no vocabulary."""
        raise NoVocabularyError(f"tokenizer {self.name!r} has no vocabulary")


def convert(
    what: str,
    *,
    data_dir: str | os.PathLike[str] = "data",
    name: str | None = None,
    tokenizer: str = "byte",
    eot: str | None = None,
    dtype: str | None = None,
    val_fraction: float | None = None,
    overwrite: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    quiet: bool = False,
) -> Path:
    """Converts token files to the data set `data_dir`/`name` and returns its folder.

    Args:
        what: "bin:" and a folder, a file, or files with commas. The names of the files contain `train` or `val`.
        data_dir: Folder of data sets.
        name: Name of the data set; None: the name of the folder or file.
        tokenizer: Tokenizer of the ids: a name of `load_tokenizer`, or "ids:N" for N ids without a vocabulary.
        eot: Token that ends a document, or of "ids:N" its id; None: the tokenizer's, or one id more than N.
        dtype: Type of the tokens of files without a header, "uint16" or "uint32"; None: uint16.
        val_fraction: Fraction of the documents to hold out, for files without a validation split.
        overwrite: Whether an existing data set is replaced.
        shard_tokens: Number of tokens in a full shard.
        quiet: Whether nothing is printed.

    Raises:
        DataError: The files are not of these formats, are damaged, or do not fit the tokenizer; an option is wrong.
        DeviceError: A package that the tokenizer needs is not installed.
        DiskError: The disk is full or cannot be written.
    """
    begin = time.perf_counter()
    named, found = _find(what.removeprefix(PREFIX))
    name = name or named
    path = Path(data_dir) / name
    files = {split: [_recognised(file, dtype) for file in found[split]] for split in SPLITS}
    _check_options(what, name, val_fraction, bool(found["val"]))
    check_target(path.resolve(), overwrite)
    encoder = _tokenizer(tokenizer, eot, data_dir)
    say: Callable[[str], object] = (lambda line: None) if quiet else print
    for split, file in [(name, file) for name in SPLITS for file in files[name]]:
        say(f"{split}: {file.path}: {file.kind}, {file.dtype}, {counted(file.tokens, 'token')}")
    writer = ShardWriter(
        path,
        tokenizer=encoder,
        source=f"token files {what.removeprefix(PREFIX)}",
        val_fraction=val_fraction or 0.0,
        split_method="the split of the token files" if val_fraction is None else _HASH,
        shard_tokens=shard_tokens,
        overwrite=overwrite,
    )
    with writer:
        for split in SPLITS:
            _write(writer, split, files[split], encoder, val_fraction)
        counts = [(split, *writer.counts(split)) for split in SPLITS]
    say(f"{path}: converted, tokenizer {encoder.name}, {time.perf_counter() - begin:.1f} s")
    for split, tokens, documents in counts:
        say(f"{split}: {counted(tokens, 'token')}, {counted(documents, 'document')}")
    return path


def _find(what: str) -> tuple[str, dict[str, list[Path]]]:
    """Returns a name for the data set, and the files of each split in the order of their names."""
    given = [Path(what)] if os.path.exists(what) else [Path(part) for part in what.split(",")]
    for path in given:
        if not os.path.exists(path):
            raise DataError(f"{PREFIX}{what}: {path} does not exist, wanted a folder, a file, or files with commas")
    files = sorted(given[0].glob("*.bin")) if os.path.isdir(given[0]) else sorted(given)
    found: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for path in files:
        if not os.path.isfile(path):
            raise DataError(f"{path}: this is not a regular file, wanted a file of tokens")
        found["val" if "val" in path.stem.lower() and "train" not in path.stem.lower() else "train"].append(path)
    if not found["train"]:
        where = ", ".join(path.name for path in files) or "no .bin file"
        raise DataError(f"{PREFIX}{what}: found {where}, wanted files of training tokens such as train.bin")
    return given[0].resolve().stem, found


def _check_options(what: str, name: str, val_fraction: float | None, has_val: bool) -> None:
    if Path(name).name != name or name.startswith("."):
        raise DataError(f"--name: found {name!r}, wanted the name of a folder")
    if val_fraction is None and not has_val:
        raise DataError(
            f"{what}: found no file with val in its name, wanted one; or --val_fraction=0.01 holds documents out"
        )
    if val_fraction is not None and has_val:
        raise DataError(f"--val_fraction: found {val_fraction}, wanted none: {what} has a validation split")
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise DataError(f"--val_fraction: found {val_fraction}, wanted 0 < val_fraction < 1; nearest: 0.01")


def _tokenizer(name: str, eot: str | None, data_dir: str | os.PathLike[str]) -> Tokenizer:
    if name == "byte":
        raise DataError(
            f"--tokenizer: found {name!r}, wanted the tokenizer that made the ids, such as gpt2, or {IDS}N for N ids "
            "without a vocabulary"
        )
    if name.startswith(IDS):
        return _IdsOnly(name, eot)
    return load_tokenizer(name, eot=eot, instead=f", or {IDS}N", data_dir=data_dir)


def _recognised(path: Path, dtype: str | None) -> _File:
    """Returns the format of a file, after the checks of its header and its size.

    Raises:
        DataError: The header is wrong, or the size does not fit.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_HEADER_BYTES)
    magic, version, count = (int.from_bytes(head[i : i + 4], "little") for i in (0, 4, 8))
    if len(head) < _HEADER_BYTES or magic not in _MAGICS:
        if int.from_bytes(head[:4], "big") in _MAGICS:
            raise DataError(f"{path}: found a header of llm.c in big-endian order, wanted little-endian")
        return _headerless(path, size, dtype or "uint16")
    wanted, stored = _MAGICS[magic]
    if version != wanted:
        raise DataError(f"{path}: found version {version} of the format {magic}, wanted {wanted}")
    if dtype not in (None, stored):
        raise DataError(f"--dtype: found {dtype!r}, wanted none or {stored}, as in the header of {path}")
    full = _HEADER_BYTES + count * DTYPES[stored].itemsize
    if size != full:
        raise DataError(
            f"{path}: found {counted(size, 'byte')}, wanted {full:,} for the {counted(count, 'token')} of its header"
        )
    return _File(path, "llm.c or modded-nanogpt", stored, _HEADER_BYTES, count)


def _headerless(path: Path, size: int, dtype: str) -> _File:
    itemsize = DTYPES[dtype].itemsize
    if size == 0 or size % itemsize:
        raise DataError(
            f"{path}: found {counted(size, 'byte')}, wanted a multiple of {itemsize}, the bytes of a {dtype}"
        )
    if dtype == "uint16" and size % 4 == 0 and size >= 64:
        high = np.fromfile(path, DTYPES[dtype], 1 << 16)[1::2]
        if high.max() < 256 and len(np.unique(high)) < 3:  # the upper halves of uint32
            raise DataError(
                f"{path}: found {high[0]} in every second token as uint16, so its tokens seem to be uint32; wanted "
                "--dtype=uint32"
            )
    return _File(path, "nanoGPT (no header)", dtype, 0, size // itemsize)


def _chunks(file: _File, vocab_size: int) -> Iterator[tuple[int, Tokens]]:
    """Yields the tokens of a file in chunks, each with the number of its first token.

    Raises:
        DataError: The file became shorter, or an id is not below `vocab_size`.
    """
    itemsize = DTYPES[file.dtype].itemsize
    for begin in range(0, file.tokens, _CHUNK):
        count = min(_CHUNK, file.tokens - begin)
        tokens = np.fromfile(file.path, DTYPES[file.dtype], count, offset=file.begin + begin * itemsize)
        if len(tokens) != count:
            raise DataError(f"{file.path}: the file became shorter while it was read")
        if int(tokens.max()) >= vocab_size:
            at = begin + int(np.argmax(tokens >= vocab_size))
            raise DataError(
                f"{file.path}: found the id {tokens[at - begin]} as token {at}, wanted ids below {vocab_size}, the "
                f"number of the tokenizer's; the file is damaged, or has another --tokenizer or --dtype"
            )
        yield begin, tokens


def _pieces(files: list[_File], encoder: Tokenizer) -> Iterator[tuple[Origin, Tokens, bool]]:
    """Yields the documents in pieces: origin of the document, ids without `eot`, and whether the document ends here.

    The offset of an origin is the number of the document's first token in its file.
    """
    origin, first = None, True
    for file in files:
        for begin, tokens in _chunks(file, encoder.vocab_size):
            last = int(first and int(tokens[0]) == encoder.eot)
            first = False
            for cut in np.flatnonzero(tokens == encoder.eot).tolist():
                if cut >= last:
                    yield origin or Origin(file.path.name, begin + last), tokens[last:cut], True
                    origin, last = None, cut + 1
            if last < len(tokens):
                origin = origin or Origin(file.path.name, begin + last)
                yield origin, tokens[last:], False
    if origin is not None:
        yield origin, np.empty(0, np.uint16), True


def _write(writer: ShardWriter, split: str, files: list[_File], encoder: Tokenizer, val_fraction: float | None) -> None:
    """Writes the documents of some files to a split or, with `val_fraction`, to the one that their hash decides."""
    digest, held = hashlib.sha256(), []
    for origin, tokens, ends in _pieces(files, encoder):
        digest.update(tokens.astype("<u4").data)
        if val_fraction is None:
            writer.append(split, tokens)
        else:
            held.append(tokens)
        if ends:
            key = int.from_bytes(digest.digest()[:8], "little")
            if val_fraction is not None:
                split = "val" if key / 2**64 < val_fraction else "train"
                for part in held:
                    writer.append(split, part)
            writer.end_document(split, origin, key)
            digest, held = hashlib.sha256(), []
