"""The one rule by which every source turns bytes into the text of a document.

A byte-order mark decides the encoding and is removed; a text without one is UTF-8. CR LF becomes LF. A text that is not
valid in its encoding, that contains NUL, or that has nothing but white space is no document; the reason is one of the
constants below.
"""

import codecs
import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import IO, NamedTuple

from gptperf.data.documents import Origin
from gptperf.formats import counted

__all__ = [
    "BINARY",
    "EMPTY",
    "HEAD_BYTES",
    "NOT_UTF8",
    "PIECE_BYTES",
    "Document",
    "Refused",
    "Skipped",
    "byte_order_mark",
    "clean",
    "cut",
    "file_document",
    "text_document",
]

EMPTY = "empty"
BINARY = "binary (contains NUL)"
NOT_UTF8 = "not UTF-8"

PIECE_BYTES = 1 << 24
"""A longer document is handled in pieces of about this size, so that the memory use does not depend on its length."""
HEAD_BYTES = 1 << 16
"""Bytes that are read of a larger file; in most cases they show whether it is text."""

_BOMS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class Document(NamedTuple):
    """A document: its text in UTF-8, and where it came from."""

    origin: Origin
    digest: bytes
    """SHA-256 of the text."""
    size: int
    """Length of the text in bytes."""
    pieces: Iterator[bytes]
    """The text, in one piece or in several of about `PIECE_BYTES`, each of which ends with a whole character."""


class Skipped:
    """Counts the files and records that were not read, by reason, and keeps the name of the first one of each."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._first: dict[str, str] = {}

    def add(self, reason: str, name: str, number: int = 1) -> None:
        """Counts `number` files or records, the first of which is `name`; a reason is "file: WHY" or "record: WHY"."""
        self.counts[reason] = self.counts.get(reason, 0) + number
        self._first.setdefault(reason, name)

    def lines(self) -> list[str]:
        """Returns a line for each reason, the most frequent first."""
        order = sorted(self.counts, key=lambda reason: (-self.counts[reason], reason))
        return [f"not read: {self._counted(reason)} (first: {self._first[reason]})" for reason in order]

    def _counted(self, reason: str) -> str:
        kind, _, why = reason.partition(": ")
        kinds = " or ".join(f"{word}s" for word in kind.split(" or "))
        return f"{counted(self.counts[reason], kind, kinds)}: {why}"


def byte_order_mark(head: bytes) -> tuple[bytes, str]:
    """Returns the byte-order mark at the start of a text, or b"", and the encoding that it stands for."""
    return next(((mark, name) for mark, name in _BOMS if head.startswith(mark)), (b"", "utf-8"))


class Refused(Exception):
    """A text is no document, or a file cannot be read as text.

    Attributes:
        reason: One of a few reasons, by which files and records are counted.
        detail: What else is known about this one.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__("; ".join(filter(None, (reason, detail))))
        self.reason = reason
        self.detail = detail


def text_document(origin: Origin, text: str) -> Document:
    """Returns a document for the text of a record; a lone surrogate becomes "?".

    Raises:
        Refused: The text is no document.
    """
    data = _unify(text.removeprefix("\ufeff").encode("utf-8", errors="replace"))
    if not data or data.isspace():
        raise Refused(EMPTY)
    return Document(origin, hashlib.sha256(data).digest(), len(data), cut(iter([data])))


def file_document(
    origin: Origin, open_content: Callable[[], AbstractContextManager[IO[bytes]]], whole: bytes | None = None
) -> Document:
    """Returns a document for the whole of a file, which is read in pieces.

    A file of more than `PIECE_BYTES` is read twice: once for its digest and size, and once for its pieces.

    Args:
        origin: Where the text comes from.
        open_content: Opens the content of the file.
        whole: Its content, of less than `PIECE_BYTES`, if it is read already.

    Raises:
        Refused: The text is no document.
        OSError: The file cannot be read.
    """
    if whole is None:
        with open_content() as file:
            whole = file.read(min(HEAD_BYTES, PIECE_BYTES + 1))
            if len(whole) == HEAD_BYTES:
                next(clean(iter([whole, b""])))
                whole += file.read(PIECE_BYTES + 1 - len(whole))
    if len(whole) <= PIECE_BYTES:
        data = b"".join(clean(iter([whole])))
        if not data.strip():
            raise Refused(EMPTY)
        return Document(origin, hashlib.sha256(data).digest(), len(data), iter([data]))
    digest, size, blank = hashlib.sha256(), 0, True
    for piece in clean(_chunks(open_content)):
        digest.update(piece)
        size += len(piece)
        blank = blank and not piece.strip()
    if blank:
        raise Refused(EMPTY)
    return Document(origin, digest.digest(), size, cut(clean(_chunks(open_content))))


def clean(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yields the text of a file in UTF-8; the module says by which rule.

    Args:
        chunks: Bytes of the file; the first chunk has the first four bytes, if there are as many.

    Raises:
        Refused: The text is not valid in its encoding, or contains NUL.
    """
    first = next(chunks, b"")
    mark, encoding = byte_order_mark(first)
    decoder = codecs.getincrementaldecoder(encoding)()
    held, done, chunk = b"", len(mark), first[len(mark) :]
    while True:
        following = next(chunks, None)
        try:
            text = decoder.decode(chunk, final=following is None)
        except UnicodeDecodeError as error:
            reason = NOT_UTF8 if encoding == "utf-8" else f"not {encoding.upper()}, which its byte-order mark promises"
            raise Refused(reason, f"at offset {done + error.start}") from error
        data = held + text.encode("utf-8")
        if b"\0" in data:
            raise Refused(BINARY)
        held = b"\r" if following is not None and data.endswith(b"\r") else b""  # its LF may be in the next chunk
        yield _unify(data[: len(data) - len(held)])
        if following is None:
            return
        done += len(chunk)
        chunk = following


def cut(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yields the same text in pieces of about `PIECE_BYTES`.

    A piece ends with a line; in a longer line it ends before a space, or else with a whole character.
    """
    rest, begin = b"", 0
    for chunk in chunks:
        rest, begin = rest[begin:] + chunk, 0
        while len(rest) - begin > PIECE_BYTES:
            most = begin + PIECE_BYTES
            end = rest.rfind(b"\n", begin, most) + 1 or max(rest.rfind(b" ", begin + 1, most), 0)
            if not end:
                end = most
                while rest[end] & 0xC0 == 0x80:  # inside a character
                    end -= 1
            yield rest[begin:end]
            begin = end
    if begin < len(rest):
        yield rest[begin:]


def _unify(data: bytes) -> bytes:
    if b"\0" in data:
        raise Refused(BINARY)
    return data.replace(b"\r\n", b"\n") if b"\r" in data else data


def _chunks(open_content: Callable[[], AbstractContextManager[IO[bytes]]]) -> Iterator[bytes]:
    with open_content() as file:
        while chunk := file.read(PIECE_BYTES):
            yield chunk
