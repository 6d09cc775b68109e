"""Says what a preparation will take: tokens, disk and time, from the sizes of the files and a sample of the text."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gptperf.data.documents import RECORD
from gptperf.data.job import Job
from gptperf.data.pipeline import threads
from gptperf.data.readers import STRUCTURED, Meter, open_file, suffixes_in_name, suffixes_of
from gptperf.data.text import Refused, Skipped, clean
from gptperf.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from gptperf.data.train_tokenizer import PREFIX
from gptperf.data.vocabulary import token_dtype
from gptperf.data.walk import Fields, check_format, file_documents
from gptperf.errors import DataError
from gptperf.files import free_bytes
from gptperf.formats import byte_text, counted, rough_duration

__all__ = ["estimate"]

_FILES = 64
"""Files of the sample that are divided among the suffixes by their shares of the bytes."""
_FILES_OF_A_KIND = 8
"""Files that the sample has of each suffix besides."""
_KINDS = 32
"""Suffixes that have files of their own in the sample, those with the most bytes; the others share some."""
_FILE_BYTES = 1 << 17
"""Text of each file of the sample that is encoded."""
_TRAINED_BYTES, _TRAINED_RATE = 4.0, 3e6
"""Bytes of text per token, and bytes of text per second and core, that are assumed for a vocabulary that is not yet
trained."""


def estimate(job: Job) -> str:
    """Returns a few lines that say what a preparation will take; it writes nothing.

    Raises:
        DataError: The files are elsewhere, or have no text; the tokenizer is not available.
    """
    files = job.source.files
    if files is None:
        raise DataError(f"--plan: {job.what} is streamed, so its size is not known; wanted a file or a folder")
    sizes: dict[Path, int] = {}
    for path in files():
        try:
            sizes[path] = path.stat().st_size
        except OSError:
            continue
    begin = time.perf_counter()
    total, text, read = sum(sizes.values()), 0.0, 0
    kinds: list[tuple[float, list[bytes]]] = []
    for files_of_kind, count in _kinds(sizes, total):
        samples = [_measure(path, size, job) for path, size in _chosen(files_of_kind, count)]
        text_of_kind = sum(files_of_kind.values()) * float(np.mean([expansion for _, expansion, _ in samples]))
        read += sum(read for _, _, read in samples)
        text += text_of_kind
        kinds.append((text_of_kind, [sample for sample, _, _ in samples if sample]))
    if not text:
        raise DataError(
            f"--plan: found no text in {counted(len(sizes), 'file')} of {job.what}, wanted at least one file with text"
        )
    read_seconds = (time.perf_counter() - begin) / max(read, 1) * text
    name, per_token, rate, cores, itemsize = _encoding(job, kinds)
    tokens = text / per_token
    size = tokens * itemsize + RECORD.itemsize * len(sizes)
    seconds = max(read_seconds, text / (rate * cores))
    speed = f"{counted(cores, 'thread')}, {byte_text(rate)}/s per thread"
    return "\n".join(
        [
            f"{job.path}: {job.source.source}; a plan, nothing is written",
            f"  text    about {byte_text(text)} in {counted(len(sizes), 'file')} of {byte_text(total)}",
            f"  tokens  about {float(f'{tokens:.2g}'):,.0f}, {per_token:.2f} bytes each; tokenizer {name}",
            f"  disk    about {byte_text(size)}, {byte_text(free_bytes(job.path))} free",
            f"  time    about {rough_duration(seconds)}; encoding in {speed}",
        ]
    )


def _kinds(sizes: dict[Path, int], total: int) -> list[tuple[dict[Path, int], int]]:
    """Returns the files that are not empty by their suffixes, and how many of each are looked into.

    Each suffix has files of its own in the sample, so that a few large binaries do not hide many small texts.
    """
    found: dict[tuple[str, str], dict[Path, int]] = {}
    for path, size in sizes.items():
        if size:
            found.setdefault(suffixes_in_name(path), {})[path] = size
    ordered = sorted(found.values(), key=lambda files: -sum(files.values()))
    rest = {path: size for files in ordered[_KINDS:] for path, size in files.items()}
    kinds = [*ordered[:_KINDS], *([rest] if rest else [])]
    return [(files, _FILES_OF_A_KIND + round(_FILES * sum(files.values()) / total)) for files in kinds]


def _chosen(sizes: dict[Path, int], count: int) -> list[tuple[Path, int]]:
    """Returns files and their sizes at evenly spaced bytes of all files, so that the large ones are among them."""
    found = list(sizes.items())
    ends = np.cumsum([size for _, size in found], dtype=np.int64)
    middles = (np.arange(count) + 0.5) * ends[-1] / count
    return [found[i] for i in np.searchsorted(ends, middles, side="right")]


def _measure(path: Path, size: int, job: Job) -> tuple[bytes, float, int]:
    """Returns text from the begin of a file, the bytes of text for each byte on disk, and the bytes of text read."""
    meter, text, read = Meter(), b"", 0
    places: list[tuple[int, int]] = []  # bytes on disk and bytes of text: readers read ahead, so differences count
    try:
        for piece in _pieces(path, job, meter):
            read += len(piece)
            text += piece[: _FILE_BYTES - len(text)] if len(text) < _FILE_BYTES else b""
            if meter.read() > (places[-1][0] if places else 0):
                places.append((meter.read(), read))
            if len(places) == 4:
                (begin, before), (end, after) = places[0], places[-1]
                return text, (after - before) / (end - begin), read
    except (Refused, DataError, OSError):
        return b"", 0.0, read  # such a file is not read
    return text, read / size, read


def _pieces(path: Path, job: Job, meter: Meter) -> Iterator[bytes]:
    kind, compression = suffixes_of(path)
    check_format(kind)
    if kind in STRUCTURED:
        for document in file_documents(path, path.name, Fields(job.text_field or "text"), Skipped(), meter=meter):
            yield from document.pieces
    else:
        with open_file(path, meter, compression) as file:
            yield from clean(iter(lambda: file.read(_FILE_BYTES), b""))


def _encoding(job: Job, kinds: list[tuple[float, list[bytes]]]) -> tuple[str, float, float, int, int]:
    """Returns name, bytes per token, bytes per second and thread, threads, and bytes of an id.

    `kinds` has the bytes of text and some texts of each kind of files.
    """
    if job.tokenizer.startswith(PREFIX):
        size = token_dtype(int(job.tokenizer.removeprefix(PREFIX))).itemsize
        name = f"{job.tokenizer}, whose rate and bytes are assumed, and whose training takes its own time"
        return name, _TRAINED_BYTES, _TRAINED_RATE, len(os.sched_getaffinity(0)), size
    tokenizer: Tokenizer = load_tokenizer(job.tokenizer, eot=job.eot, data_dir=job.data_dir)
    begin = time.perf_counter()
    encoded = [
        (size, sum(map(len, texts)), sum(len(tokenizer.encode(text)) for text in texts)) for size, texts in kinds
    ]
    rate = sum(n_bytes for _, n_bytes, _ in encoded) / max(time.perf_counter() - begin, 1e-6)
    itemsize = token_dtype(tokenizer.vocab_size).itemsize
    tokens = sum(size * found / max(n_bytes, 1) for size, n_bytes, found in encoded)
    per_token = 1.0 if isinstance(tokenizer, ByteTokenizer) else sum(size for size, _, _ in encoded) / max(tokens, 1e-6)
    return tokenizer.name, per_token, rate, threads(tokenizer), itemsize
