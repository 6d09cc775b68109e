"""Encodes documents on all cores and writes them in their order; the bytes in memory are bounded."""

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from gptperf.data.documents import Origin
from gptperf.data.split import tail_pieces
from gptperf.data.text import Document
from gptperf.data.tokenizers import ByteTokenizer, Tokenizer
from gptperf.data.vocabulary import PIECE_CHARACTERS, Tokens, as_text, pieces
from gptperf.data.writer import ShardWriter, SourceChangedError
from gptperf.errors import DataError
from gptperf.formats import counted

__all__ = ["Chosen", "Part", "document_parts", "encoded", "text_parts", "threads", "write_parts"]

_TASK_BYTES = 1 << 17
"""Bytes of short documents that a thread encodes at a time."""
_IN_FLIGHT_BYTES = 8 << 20
"""Bytes of text that are read but not yet written. The tokenizers library takes 130 bytes for each that is encoded at a
time, and keeps a part of them, so with any number of threads the memory stays below 2 GB."""
_SAVE_SECONDS = 20.0
"""Time after which the progress is saved, so that a killed preparation goes on from there."""

Chosen = tuple[Document, str | None]
"""A document and its split; None: it is left out."""


class _End(NamedTuple):
    """A document ends with this part."""

    digest: int
    """First 64 bits of the SHA-256 of the text."""
    size: int
    """Length of the text in bytes."""


class Part(NamedTuple):
    """A document or a part of one, of at most about `PIECE_CHARACTERS`."""

    split: str
    text: bytes
    origin: Origin
    begin: int
    """Offset in its document."""
    end: _End | None
    place: dict[str, Any]
    """Place of the part in the source: where a preparation goes on that is killed after it."""


class _Chain:
    """The number of the documents so far, and a digest over the digests of all of them."""

    def __init__(self, resumed: dict[str, Any] | None) -> None:
        self.number = 0
        self._digest = b""
        self._resumed = resumed or {"document": 0}

    def add(self, document: Document) -> None:
        """Adds a document.

        Raises:
            SourceChangedError: The documents are not those from which a killed preparation had written.
        """
        self.number += 1
        self._digest = hashlib.sha256(self._digest + document.digest).digest()
        if self.number == self._resumed["document"] and self._digest.hex() != self._resumed["chain"]:
            raise SourceChangedError

    def written(self) -> bool:
        """Whether the last document had been written as a whole."""
        return self.number < self._resumed["document"]

    def parts(self) -> int:
        """Returns how many parts of the last document had been written."""
        return int(self._resumed["parts"]) if self.number == self._resumed["document"] else 0

    def place(self, parts: int) -> dict[str, Any]:
        """Returns the place behind `parts` parts of the last document."""
        return {"document": self.number, "chain": self._digest.hex(), "parts": parts}

    def finish(self) -> None:
        """Raises `SourceChangedError` if there are fewer documents than before."""
        if self.number < self._resumed["document"]:
            raise SourceChangedError


def document_parts(chosen: Iterable[Chosen], tokenizer: Tokenizer, writer: ShardWriter) -> Iterator[Part]:
    """Yields the parts of documents that are still to be written."""
    chain = _Chain(writer.resumed)
    for document, split in chosen:
        chain.add(document)
        if split is None:
            continue
        if chain.written():
            writer.recall(document.origin)
            continue
        begin = 0
        for number, text in enumerate(_split_long(document.pieces, tokenizer), 1):
            last = begin + len(text) == document.size
            end = _End(int.from_bytes(document.digest[:8], "big"), document.size) if last else None
            part = Part(split, text, document.origin, begin, end, chain.place(number))
            begin += len(text)
            yield from _unwritten(part, number > chain.parts(), writer)
    chain.finish()


def text_parts(document: Document, fraction: float, tokenizer: Tokenizer, writer: ShardWriter) -> Iterator[Part]:
    """Yields the parts of a single text that are still to be written: its head, then its tail for validation."""
    chain = _Chain(writer.resumed)
    chain.add(document)
    number = done = begin = 0
    before: tuple[str, bytes] | None = None
    digest = hashlib.sha256()

    def part(split: str, text: bytes, ends: bool) -> Iterator[Part]:
        nonlocal number, begin, digest, done
        number += 1
        digest.update(text)
        end = _End(int.from_bytes(digest.digest()[:8], "big"), done + len(text) - begin) if ends else None
        found = Part(split, text, document.origin._replace(offset=begin), done - begin, end, chain.place(number))
        done += len(text)
        if ends:
            digest, begin = hashlib.sha256(), done
        yield from _unwritten(found, number > chain.parts(), writer)

    for split, piece in tail_pieces(document, fraction):
        for text in _split_long(iter([piece]), tokenizer):
            if before is not None:
                yield from part(*before, ends=before[0] != split)
            before = split, text
    if before is not None:
        yield from part(*before, ends=True)


def _unwritten(part: Part, is_new: bool, writer: ShardWriter) -> Iterator[Part]:
    if is_new:
        yield part
    elif part.end is not None:
        writer.recall(part.origin)


def _split_long(texts: Iterator[bytes], tokenizer: Tokenizer) -> Iterator[bytes]:
    for text in texts:
        if len(text) <= PIECE_CHARACTERS or isinstance(tokenizer, ByteTokenizer):
            yield text
        else:
            yield from (piece.encode() for piece in pieces(as_text(tokenizer.name, text)))


def threads(tokenizer: Tokenizer) -> int:
    """Returns the number of threads that encode: the libraries encode without the GIL; bytes need no encoding."""
    return 1 if isinstance(tokenizer, ByteTokenizer) else len(os.sched_getaffinity(0))


def encoded(parts: Iterable[Part], tokenizer: Tokenizer) -> Iterator[tuple[Part, Tokens]]:
    """Yields each part with its ids, in order; the threads encode the parts that follow it meanwhile."""
    pending: deque[tuple[int, list[Part], Future[list[Tokens]]]] = deque()
    pool = ThreadPoolExecutor(threads(tokenizer))
    try:
        in_flight = 0
        for task in _tasks(parts):
            size = sum(len(part.text) for part in task)
            pending.append((size, task, pool.submit(_encode, task, tokenizer)))
            in_flight += size
            while in_flight > _IN_FLIGHT_BYTES:
                size, task, future = pending.popleft()
                in_flight -= size
                yield from zip(task, future.result(), strict=True)
        while pending:
            _, task, future = pending.popleft()
            yield from zip(task, future.result(), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _tasks(parts: Iterable[Part]) -> Iterator[list[Part]]:
    task: list[Part] = []
    size = 0
    for part in parts:
        if task and size + len(part.text) > _TASK_BYTES:
            yield task
            task, size = [], 0
        task.append(part)
        size += len(part.text)
    if task:
        yield task


def _encode(task: list[Part], tokenizer: Tokenizer) -> list[Tokens]:
    found = []
    for part in task:
        try:
            found.append(tokenizer.encode(part.text))
        except DataError as error:
            where = f"{part.origin.source}, record {part.origin.offset}"
            raise DataError(
                f"{where}, in the {counted(len(part.text), 'byte')} at byte {part.begin:,}: {error}"
            ) from error
    return found


def write_parts(
    writer: ShardWriter, parts: Iterable[Part], tokenizer: Tokenizer, progress: Callable[[int], None]
) -> None:
    """Encodes and writes parts, and saves the progress from time to time.

    Args:
        writer: Writer of the data set.
        parts: Parts in the order in which they are written.
        tokenizer: Tokenizer of the ids.
        progress: Called with the number of tokens so far.
    """
    saved, tokens = time.monotonic(), writer.tokens()
    for part, ids in encoded(parts, tokenizer):
        writer.append(part.split, ids)
        tokens += len(ids)
        if part.end is not None:
            writer.end_document(part.split, part.origin, *part.end)
        progress(tokens)
        if time.monotonic() - saved >= _SAVE_SECONDS:
            writer.save(part.place)
            saved = time.monotonic()
