"""What all tokenizers share: their interface, the text that they take, and long documents in pieces."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gptperf.errors import DataError
from gptperf.formats import counted

__all__ = [
    "IDS",
    "NoVocabularyError",
    "PIECE_CHARACTERS",
    "RefusedError",
    "TRAINED_PATTERN",
    "Tokenizer",
    "Tokens",
    "as_array",
    "as_text",
    "encode_in_pieces",
    "pieces",
    "short_pieces",
    "token_dtype",
]

Tokens = npt.NDArray[Any]

IDS = "ids:"
"""Begins the name of a tokenizer that has ids without a vocabulary: `ids:65`."""
PIECE_CHARACTERS = 1 << 20
"""Characters that a tokenizer encodes at a time. More make some tokenizers slow or fail, and only one thread works."""
# Words with the character before them (a space, a quote, a bracket), as in cl100k_base, and an English contraction with
# its word; its "'" must not end a longer word, so that 'self' of source code is not cut into "'s" and "elf". Digits are
# in groups of three at most, so that numbers share tokens. Line breaks are apart from the indentation after them.
TRAINED_PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?\p{L}+(?:'(?i:[sdmt]|ll|re|ve)(?!\p{L}))?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
_SHORT_CHARACTERS = 1 << 15
"""Characters after which `short_pieces` cuts. The tokenizers library takes 130 bytes of memory for each of them."""
_SMALLEST_PIECE = 1 << 12
_WINDOW = 1 << 16
"""Characters before the end of a piece in which a good place for the cut is looked for."""
_LINE = re.compile(r"\S\n(?=\w)")
_WORD = re.compile(r"\S(?= [^\W\d_])")
_LINE_OR_WORD = re.compile(f"{_LINE.pattern}|{_WORD.pattern}")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Returns the smallest shard dtype, little-endian uint16 or uint32, that holds ids below `vocab_size`."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class Tokenizer(Protocol):
    """The interface of a tokenizer that preparation and sampling use."""

    @property
    def name(self) -> str:
        """Name of the tokenizer, for people; `fingerprint` identifies it."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; the ids are 0 to `vocab_size - 1`, and some of them may have no text."""

    @property
    def eot(self) -> int:
        """Id that ends a document."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over what decides the ids of a text."""

    @property
    def files(self) -> Mapping[str, bytes]:
        """File name -> content of the files that define the vocabulary; `tokenizers.restore_tokenizer` reads them."""

    def encode(self, text: bytes | str) -> Tokens:
        """Returns the ids of one document, (n,) uint16 or uint32, without `eot`."""

    def decode(self, ids: Iterable[int] | Tokens) -> str:
        """Returns the text of `ids`; bytes that are not UTF-8 become U+FFFD."""


class NoVocabularyError(DataError):
    """A vocabulary is known by its name alone, and cannot be found under this name or be downloaded."""


class RefusedError(Exception):
    """A tokenizer library cannot encode a text."""


def as_text(name: str, text: bytes | str) -> str:
    """Returns `text` as a str without lone surrogates, which become "?".

    Raises:
        DataError: `text` is bytes and not UTF-8; the message names the tokenizer `name`.
    """
    if isinstance(text, str):
        return text.encode("utf-8", errors="replace").decode("utf-8")
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"tokenizer {name!r}: found byte 0x{text[error.start]:02x} at offset {error.start}, "
            "wanted UTF-8 (the tokenizer 'byte' takes any bytes)"
        ) from error


def as_array(ids: Iterable[int] | Tokens) -> Tokens:
    """Returns ids as an array, (n,) integers."""
    if hasattr(ids, "__array__"):
        return np.asarray(ids).reshape(-1)
    return np.fromiter(ids, np.int64)


def pieces(text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Yields a text in pieces of at most `size` characters; a shorter text is one piece.

    A piece ends at the last line break between a visible character and a letter, digit or "_", else before the last
    space between a visible character and a letter, else after `size` characters; the first two within the last 65,536
    characters. A tokenizer that starts a new token at these two places, as the vocabularies of tiktoken, GPT-2's
    and those of `train_tokenizer` do, gives the same ids for the pieces as for the whole. A tokenizer that puts
    a space before a text puts one before every piece. After `size` characters any token may be cut.
    """
    begin = 0
    while len(text) - begin > size:
        end = begin + size
        low = max(begin, end - _WINDOW)
        near = text[low : end + 2]  # with the characters after the cut that the patterns look at
        for pattern in (_LINE, _WORD):
            cuts = [low + match.end() for match in pattern.finditer(near)]
            cuts = [cut for cut in cuts if begin < cut <= end]
            if cuts:
                end = cuts[-1]
                break
        yield text[begin:end]
        begin = end
    yield text[begin:]


def short_pieces(text: str, size: int = _SHORT_CHARACTERS) -> Iterator[str]:
    """Yields a text in pieces of a little more than `size` characters that have the same words as the whole.

    A piece ends at the first good place of `pieces` after `size` characters; a text without one stays whole.
    """
    begin = 0
    while found := _LINE_OR_WORD.search(text, begin + size):
        yield text[begin : found.end()]
        begin = found.end()
    yield text[begin:]


def encode_in_pieces(
    name: str, text: str, encode: Callable[[str], Tokens], size: int = PIECE_CHARACTERS, begin: int = 0
) -> Tokens:
    """Encodes a document in `pieces`; a piece that the library refuses is encoded in smaller ones.

    Args:
        name: Name of the tokenizer, for the error.
        text: The document, or a part of it.
        encode: Returns the ids of a text, (n,), or raises `RefusedError`.
        size: Characters of a piece.
        begin: Place of `text` in its document, for the error.

    Returns:
        The ids, (n,), in the dtype that `encode` returns.

    Raises:
        DataError: A piece of at most 4,096 characters is refused too; the message says where it is.
    """
    found = []
    for piece in pieces(text, size):
        try:
            found.append(encode(piece))
        except RefusedError as error:
            if size <= _SMALLEST_PIECE:
                raise DataError(
                    f"tokenizer {name!r}: cannot encode the {counted(len(piece), 'character')} at character {begin} "
                    f"({piece[:20]!r}...): {error}"
                ) from error
            found.append(encode_in_pieces(name, piece, encode, size // 16, begin))
        begin += len(piece)
    return found[0] if len(found) == 1 else np.concatenate(found)
