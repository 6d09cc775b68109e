"""Tokenizers for raw bytes and for tiktoken's vocabularies.

The manifest of a data set names its tokenizer, with a fingerprint of the vocabulary, so that a model is never trained
on ids whose meaning has changed. The text of a special token in a document is encoded as ordinary text.
"""

import difflib
import functools
import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from gptperf.errors import DataError

if TYPE_CHECKING:
    import tiktoken

__all__ = ["ByteTokenizer", "TiktokenTokenizer", "Tokenizer", "load_tokenizer", "token_dtype"]

Tokens = npt.NDArray[Any]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Returns the smallest shard dtype, little-endian uint16 or uint32, that holds ids below `vocab_size`."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class Tokenizer(Protocol):
    """The interface of a tokenizer that preparation and sampling use."""

    @property
    def name(self) -> str:
        """Name under which `load_tokenizer` finds it."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; the ids are 0 to `vocab_size - 1`."""

    @property
    def eot(self) -> int:
        """Id that ends a document."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the vocabulary: equal if and only if every id has the same bytes."""

    def encode(self, text: bytes | str) -> Tokens:
        """Returns the ids of one document, (n,) uint16 or uint32, without `eot`."""

    def decode(self, ids: Iterable[int] | Tokens) -> str:
        """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD."""


class ByteTokenizer:
    """A tokenizer whose ids 0 to 255 are the bytes of the text; id 256 ends a document."""

    name = "byte"
    vocab_size = 257
    eot = 256

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the vocabulary."""
        return _fingerprint((bytes([i]) for i in range(256)), self.eot)

    def encode(self, text: bytes | str) -> Tokens:
        """Returns the bytes of `text` as ids, (n,) uint16; a str is encoded as UTF-8, with "?" for lone surrogates."""
        data = text.encode("utf-8", errors="replace") if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(token_dtype(self.vocab_size))

    def decode(self, ids: Iterable[int] | Tokens) -> str:
        """Returns the text of `ids`; ids of 256 and above have no bytes and are dropped."""
        values = _as_array(ids)
        return values[(values >= 0) & (values < 256)].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class TiktokenTokenizer:
    """An encoding of tiktoken, by its name ("gpt2", "cl100k_base", ...).

    Raises:
        DataError: The vocabulary is not in tiktoken's cache and cannot be downloaded, or it has no end-of-text token.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.encoding = _get_encoding(name)
        self.vocab_size = self.encoding.n_vocab
        try:
            self.eot = self.encoding.eot_token
        except KeyError as error:
            raise DataError(
                f"tokenizer {name!r}: found no <|endoftext|> token, wanted one to end a document"
            ) from error
        self._dtype = token_dtype(self.vocab_size)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the vocabulary; an id without bytes has an entry of its own."""
        return _fingerprint((self._token_bytes(i) for i in range(self.vocab_size)), self.eot)

    def encode(self, text: bytes | str) -> Tokens:
        """Returns the ids of `text`, (n,) uint16 or uint32.

        The text of a special token is encoded as ordinary text, and a lone surrogate as "?".

        Raises:
            DataError: `text` is bytes and not UTF-8.
        """
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"tokenizer {self.name!r}: found byte 0x{text[error.start]:02x} at offset {error.start}, "
                    "wanted UTF-8 (the tokenizer 'byte' takes any bytes)"
                ) from error
        try:
            ids = self.encoding.encode_to_numpy(text, allowed_special=set(), disallowed_special=())
        except UnicodeEncodeError:  # a lone surrogate, as from "\\ud800" in JSON
            clean = text.encode("utf-8", errors="replace").decode("utf-8")
            ids = self.encoding.encode_to_numpy(clean, allowed_special=set(), disallowed_special=())
        return ids.astype(self._dtype)

    def decode(self, ids: Iterable[int] | Tokens) -> str:
        """Returns the text of `ids`; ids without bytes (padding of the vocabulary) are dropped."""
        pieces = (self._token_bytes(int(i)) for i in _as_array(ids))
        return b"".join(piece for piece in pieces if piece is not None).decode("utf-8", errors="replace")

    def _token_bytes(self, token: int) -> bytes | None:
        try:
            return self.encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError):
            return None


def load_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer called `name`: "byte" or an encoding of tiktoken.

    Raises:
        DataError: The name is unknown, or the vocabulary is not available offline.
    """
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    import tiktoken

    known = ["byte", *tiktoken.list_encoding_names()]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"; nearest: {near[0]!r}" if near else ""
        raise DataError(f"tokenizer: found {name!r}, wanted one of {', '.join(known)}{hint}")
    return TiktokenTokenizer(name)


def _get_encoding(name: str) -> "tiktoken.Encoding":
    import tiktoken

    try:
        return tiktoken.get_encoding(name)
    except OSError as error:  # every error of requests is an OSError, and so is an unreadable cache
        where = f": {error.filename}" if error.filename else ""
        raise DataError(
            f"tokenizer {name!r}: its vocabulary is not in the cache and cannot be downloaded "
            f"({type(error).__name__}{where}). Run once with a network, or set TIKTOKEN_CACHE_DIR to a folder that "
            "holds it, or use --tokenizer=byte, which needs no vocabulary"
        ) from error
    except ValueError as error:  # an unknown name, or a download whose checksum is not the one that tiktoken expects
        raise DataError(f"tokenizer {name!r}: tiktoken cannot load it: {str(error).splitlines()[0]}") from error


def _as_array(ids: Iterable[int] | Tokens) -> Tokens:
    if hasattr(ids, "__array__"):
        return np.asarray(ids).reshape(-1)
    return np.fromiter(ids, np.int64)


def _fingerprint(vocabulary: Iterable[bytes | None], eot: int) -> str:
    digest = hashlib.sha256(b"gptperf vocabulary 1\n")
    for piece in vocabulary:
        # The length before the bytes makes the streams of two vocabularies differ; -1 stands for an id without bytes.
        size = -1 if piece is None else len(piece)
        digest.update(size.to_bytes(4, "little", signed=True) + (piece or b""))
    digest.update(eot.to_bytes(8, "little"))
    return digest.hexdigest()
