"""Tokenizers by name, and the files of a tokenizer, which travel with a data set and with each checkpoint.

The manifest of a data set has a fingerprint of the vocabulary, so that a model is never trained on ids whose meaning
has changed. Once a data set is prepared, nothing about its tokenizer is looked up elsewhere. The text of a special
token in a document is encoded as ordinary text.
"""

import difflib
import functools
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from gptperf.data.format import MANIFEST, TokenizerInfo, read_manifest
from gptperf.data.json_tokenizer import TOKENIZER_JSON, JsonTokenizer
from gptperf.data.tiktoken_vocabulary import RANKS, TiktokenTokenizer, vocabulary_fingerprint
from gptperf.data.train_tokenizer import PREFIX
from gptperf.data.vocabulary import IDS, NoVocabularyError, Tokenizer, Tokens, as_array, token_dtype
from gptperf.errors import DataError
from gptperf.files import sync_directory, sync_file

__all__ = [
    "ByteTokenizer",
    "JsonTokenizer",
    "NoVocabularyError",
    "TiktokenTokenizer",
    "Tokenizer",
    "load_tokenizer",
    "read_vocabulary",
    "restore_tokenizer",
    "token_dtype",
    "write_vocabulary",
]

_FOLDER = "tokenizer"
"""Folder of the vocabulary's files in a data set."""


class ByteTokenizer:
    """A tokenizer whose ids 0 to 255 are the bytes of the text; id 256 ends a document."""

    name = "byte"
    vocab_size = 257
    eot = 256
    files: Mapping[str, bytes] = {}

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the vocabulary."""
        return vocabulary_fingerprint((bytes([i]) for i in range(256)), self.eot)

    def encode(self, text: bytes | str) -> Tokens:
        """Returns the bytes of `text` as ids, (n,) uint16; a str is encoded as UTF-8, with "?" for lone surrogates."""
        data = text.encode("utf-8", errors="replace") if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(token_dtype(self.vocab_size))

    def decode(self, ids: Iterable[int] | Tokens) -> str:
        """Returns the text of `ids`; ids of 256 and above have no bytes and are dropped."""
        values = as_array(ids)
        return values[(values >= 0) & (values < 256)].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


def load_tokenizer(
    name: str, *, eot: str | None = None, instead: str = "", data_dir: str | os.PathLike[str] | None = None
) -> Tokenizer:
    """Returns the tokenizer called `name`, whose vocabulary may be downloaded.

    Args:
        name: "byte", an encoding of tiktoken, "hf:REPO", a data set of `data_dir`, whose tokenizer it is, or a path: a
            tokenizer.json, a folder that has one, or a data set.
        eot: The token that ends a document; None: the one that the tokenizer names itself.
        instead: What else the caller's user can do if the vocabulary is not available, for the end of the message.
        data_dir: Folder of data sets; None: a data set is known by its path alone.

    Raises:
        DataError: The name is unknown, the vocabulary is not available offline, or no token ends a document.
        DeviceError: A package is not installed.
    """
    if name == ByteTokenizer.name:
        if eot is not None:
            raise DataError(f"--eot: found {eot!r}, wanted none: the id 256 ends a document of the tokenizer 'byte'")
        return ByteTokenizer()
    if name.startswith(IDS):
        raise NoVocabularyError(f"tokenizer {name!r}: these ids have no vocabulary, so they cannot be decoded to text")
    if name.startswith("hf:"):
        return JsonTokenizer.find(name, eot)
    if os.path.isfile(Path(name, MANIFEST)):
        return _of_data_set(Path(name), eot)
    import tiktoken

    known = tiktoken.list_encoding_names()
    if name in known:
        return TiktokenTokenizer.download(name, eot, instead)
    sets = (
        {} if data_dir is None else {path.parent.name: path.parent for path in Path(data_dir).glob(f"[!.]*/{MANIFEST}")}
    )
    if name in sets:
        return _of_data_set(sets[name], eot)
    if os.path.exists(name) or os.sep in name or name.endswith(".json"):
        return JsonTokenizer.find(name, eot)
    near = difflib.get_close_matches(name, ["byte", *known, *sorted(sets)], n=1, cutoff=0.4)
    hint = f"; nearest: {near[0]!r}" if near else ""
    raise NoVocabularyError(
        f"tokenizer: found {name!r}, wanted one of byte, {', '.join(known)}, a tokenizer.json or its folder, "
        f"{'the folder of a data set' if data_dir is None else f'a data set in {data_dir} or its folder'}, hf:REPO or "
        f"{PREFIX}N{hint}"
    )


def _of_data_set(folder: Path, eot: str | None) -> Tokenizer:
    info = read_manifest(folder).tokenizer
    if eot is not None:
        raise DataError(f"--eot: found {eot!r}, wanted none: a document of {folder} ends with the id {info.eot}")
    return restore_tokenizer(info, read_vocabulary(folder, info), folder)


def restore_tokenizer(info: TokenizerInfo, files: Mapping[str, bytes], where: Path) -> Tokenizer:
    """Returns the tokenizer of a data set or checkpoint; needs no network and no cache.

    Args:
        info: Its entry in the manifest or the state. A checkpoint of an earlier version has the name and the
            fingerprint alone; its `vocab_size` is 0.
        files: Its `files`. Where an earlier version has written none, the vocabulary is looked up by its name.
        where: The data set or checkpoint, for the error.

    Raises:
        DataError: The files are not the vocabulary of this entry, or the vocabulary of this name cannot be found.
        DeviceError: A package is not installed.
    """
    tokenizer: Tokenizer
    if TOKENIZER_JSON in files:
        tokenizer = JsonTokenizer(info.name, files[TOKENIZER_JSON], info.eot)
    elif RANKS in files:
        tokenizer = TiktokenTokenizer.from_files(info.name, files)
    elif files:
        raise DataError(
            f"{where}: tokenizer {info.name!r}: found {', '.join(files)}, wanted {TOKENIZER_JSON} or {RANKS}"
        )
    else:
        tokenizer = load_tokenizer(info.name)
    what = "its files have" if files else "installed here has"
    if tokenizer.fingerprint != info.fingerprint:
        raise DataError(
            f"{where}: tokenizer {info.name!r}: {what} the fingerprint {tokenizer.fingerprint[:12]}, wanted "
            f"{info.fingerprint[:12]}, of the version that encoded the data; prepare the data set again"
        )
    if info.vocab_size not in (0, tokenizer.vocab_size):
        raise DataError(
            f"{where}: tokenizer {info.name!r}: {what} {tokenizer.vocab_size:,} ids, wanted {info.vocab_size:,}"
        )
    return tokenizer


def write_vocabulary(tokenizer: Tokenizer, folder: Path) -> TokenizerInfo:
    """Writes the files of a tokenizer into the data set in `folder` and returns the entry for its manifest.

    Raises:
        OSError: A file cannot be written.
    """
    target = folder / _FOLDER
    for name, content in tokenizer.files.items():
        target.mkdir(exist_ok=True)
        (target / name).write_bytes(content)
        sync_file(target / name)
        sync_directory(target)
    return TokenizerInfo(
        name=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        fingerprint=tokenizer.fingerprint,
        eot=tokenizer.eot,
        files={name: hashlib.sha256(content).hexdigest() for name, content in tokenizer.files.items()},
    )


def read_vocabulary(folder: Path, info: TokenizerInfo) -> dict[str, bytes]:
    """Returns the files of the tokenizer of the data set in `folder`, compared with the checksums of its manifest.

    Raises:
        DataError: A file is missing or differs.
    """
    found = {}
    for name, wanted in info.files.items():
        path = folder / _FOLDER / name
        try:
            found[name] = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}; prepare the data set again") from error
        digest = hashlib.sha256(found[name]).hexdigest()
        if digest != wanted:
            raise DataError(
                f"{path}: found SHA-256 {digest[:12]}, wanted {wanted[:12]} (the manifest's): the file is corrupt; "
                "prepare the data set again"
            )
    return found
