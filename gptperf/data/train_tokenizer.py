"""Trains a vocabulary of byte pairs (BPE) on a sample of a corpus, with the `tokenizers` library (extra hf)."""

import contextlib
import ctypes
import hashlib
import heapq
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

from gptperf.data.json_tokenizer import JsonTokenizer, tokenizers_library
from gptperf.data.vocabulary import TRAINED_PATTERN, as_text, pieces, short_pieces
from gptperf.errors import DataError

__all__ = ["PREFIX", "SAMPLE_BYTES", "train_tokenizer", "vocabulary_size"]

PREFIX = "train:"
SAMPLE_BYTES = 200_000_000
"""Bytes of text that the vocabulary is trained on; fewer if they have more than `_WORD_BYTES` of different words."""
_WORD_BYTES = 8_000_000
"""Bytes of different words. To count their pairs takes up to 160 bytes of memory for each, most for a script without
spaces, where a clause is a word. 200 MB of source code have 3 million."""
_PROBE = 4_000_000
_WORD = re.compile(r"[^\W\d_]+|[^\w\s]+|\s+")
"""Almost the words of `TRAINED_PATTERN`; digits have few."""
_BYTES = 256
_END_OF_TEXT = "<|endoftext|>"
_MOST = 1 << 20


def vocabulary_size(name: str) -> int:
    """Returns N of "train:N".

    Raises:
        DataError: N is not a number from 257 to 1,048,576.
    """
    digits = name.removeprefix(PREFIX)
    size = int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 10 else 0
    if not _BYTES < size <= _MOST:
        raise DataError(
            f"tokenizer: found {name!r}, wanted train:N with N from {_BYTES + 1} (256 bytes and the end of a document) "
            f"to {_MOST}, e.g. train:32768"
        )
    return size


def train_tokenizer(name: str, documents: Iterable[bytes]) -> JsonTokenizer:
    """Trains a byte-level BPE and returns its tokenizer. The same documents in any order give the same vocabulary.

    Ids 0 to 255 are the bytes, so every text survives encoding and decoding; the last id is `<|endoftext|>`.

    Args:
        name: "train:N", with the number of ids.
        documents: UTF-8 documents; see `_sample` for what is taken of a large corpus.

    Raises:
        DataError: N is wrong, a document is not UTF-8, or the documents have fewer different tokens; the message names
            the largest N.
        DeviceError: The package `tokenizers` is not installed.
    """
    size = vocabulary_size(name)
    library = tokenizers_library(name)
    byte_level: Any = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained = library.Tokenizer(library.models.BPE())
    split = library.pre_tokenizers.Split(library.Regex(TRAINED_PATTERN), "isolated")
    trained.pre_tokenizer = library.pre_tokenizers.Sequence([split, byte_level])
    trained.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=size - 1,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(_bounded(_short(_sample(name, documents))), trainer)
    _give_back()
    largest = trained.get_vocab_size() + 1
    if largest < size:
        raise DataError(
            f"tokenizer {name!r}: the text is enough for {largest:,} ids, wanted {size:,}; nearest: "
            f"{PREFIX}{largest}, or more text"
        )
    trained.add_special_tokens([library.AddedToken(_END_OF_TEXT, normalized=False, special=True)])
    return JsonTokenizer(name, trained.to_str().encode(), _END_OF_TEXT)


def _give_back() -> None:
    """Gives the memory that is free again back to the system; the C library would keep a gigabyte of it."""
    with contextlib.suppress(OSError, AttributeError):  # only glibc keeps it, and has this function
        ctypes.CDLL(None).malloc_trim(0)


def _sample(name: str, documents: Iterable[bytes], limit: int | None = None) -> Iterator[str]:
    """Yields pieces of the documents, of at most `limit` bytes together (None: `SAMPLE_BYTES`).

    The pieces are those with the smallest SHA-256, in its order, so the sample does not depend on the order of the
    documents. All documents are read, and the sample is in memory.
    """
    limit = SAMPLE_BYTES if limit is None else limit
    kept: list[tuple[int, bytes]] = []  # a heap whose first entry has the largest hash
    total = 0
    for document in documents:
        for piece in pieces(as_text(name, document)):
            data = piece.encode()
            rank = -int.from_bytes(hashlib.sha256(data).digest(), "big")
            if total + len(data) > limit and kept and rank < kept[0][0]:
                continue
            heapq.heappush(kept, (rank, data))
            total += len(data)
            while total > limit and len(kept) > 1:
                total -= len(heapq.heappop(kept)[1])
    kept.sort()
    while kept:  # what was given away is freed
        yield kept.pop()[1].decode()


def _short(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from short_pieces(text)


def _bounded(texts: Iterable[str]) -> Iterator[str]:
    """Yields texts in random order, until their different words have about `_WORD_BYTES` bytes.

    How fast new words come is seen in the first `_PROBE` bytes, and goes on as a power of the length.
    """
    words: set[str] = set()
    read, distinct = 0, 0
    early: tuple[int, int] | None = None
    most = math.inf
    for text in texts:
        if read >= most:
            return
        yield text
        seen, read = read, read + len(text.encode())
        if seen >= _PROBE:
            continue
        new = set(_WORD.findall(text)) - words
        words |= new
        distinct += sum(len(word.encode()) for word in new)
        if early is None and read >= _PROBE // 4:
            early = read, distinct
        if early is not None and read >= _PROBE:
            growth = math.log(max(distinct, 1) / max(early[1], 1)) / math.log(read / early[0])
            most = read * (_WORD_BYTES / max(distinct, 1)) ** (1 / max(growth, 0.3))
            words.clear()
