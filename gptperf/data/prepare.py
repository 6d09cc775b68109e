"""Prepares a data set from text: files, folders, the standard library, or Hugging Face.

`split.py` chooses the validation documents, `dedup.py` finds copies, and `pipeline.py` encodes and writes.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptperf.data.format import SPLITS, read_manifest
from gptperf.data.job import Job
from gptperf.data.leak import measure_leak
from gptperf.data.pipeline import Chosen, document_parts, text_parts, write_parts
from gptperf.data.progress import progress_bar
from gptperf.data.readers import Meter
from gptperf.data.sources import KNOWN
from gptperf.data.split import tail_pieces
from gptperf.data.text import Document, Skipped
from gptperf.data.tokenizers import Tokenizer, load_tokenizer
from gptperf.data.train_tokenizer import PREFIX, train_tokenizer, vocabulary_size
from gptperf.data.writer import ShardWriter, SourceChangedError, check_target
from gptperf.errors import DataError
from gptperf.formats import counted

__all__ = ["KNOWN", "prepare", "summary"]

_OTHER_TOKENIZER = ", or use --tokenizer=byte, which needs no vocabulary"


def prepare(what: str, **options: Any) -> Path:
    """Prepares the data set `what` and returns its folder.

    A preparation that is killed goes on where it was, at most about 20 seconds before, when it is called again with the
    same options and unchanged text; the data set is the same, byte for byte.

    Args:
        what: A name of `KNOWN`, "hf:REPO[:CONFIG]", or the path of a file or a folder.
        options: The other fields of `gptperf.data.job.Job`, such as name, data_dir, tokenizer and val_fraction.

    Raises:
        DataError: `what` or `tokenizer` is unknown or unreadable; `what` is too small or lacks the field; the data set
            exists; a download failed; the tokenizer refuses a document.
        DeviceError: A package that `what` or the tokenizer needs is not installed.
        DiskError: The disk is full or cannot be written.
    """
    begin = time.perf_counter()
    job = Job(what=what, **options)
    check_target(job.path.resolve(), job.overwrite)
    lines = _write(job, _tokenizer(job))
    if not job.quiet:
        leak = measure_leak(job.path)
        lines += [summary(job.path, time.perf_counter() - begin), *([f"  {leak.line()}"] if leak.windows else [])]
        print("\n".join(lines))
    return job.path


def _write(job: Job, tokenizer: Tokenizer) -> list[str]:
    """Writes the data set, or goes on with a killed preparation, and returns what is to be said about it."""
    while True:
        work = _Work(job, tokenizer)
        try:
            with job.writer(tokenizer) as writer:
                if writer.resumed and not job.quiet:
                    done = counted(writer.tokens(), "token")
                    print(f"{job.path}: continues a preparation that was ended, after its {done}")
                work.write(writer)
            return work.lines()
        except SourceChangedError:
            if not job.quiet:
                print(f"{job.path}: the text is not what it was; begins anew")


class _Work:
    """What is counted while the documents of a source are written."""

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        self._job = job
        self._tokenizer = tokenizer
        self._split = job.hash_split()
        self._copies = job.copies()
        self._skipped = Skipped()

    def write(self, writer: ShardWriter) -> None:
        """Writes the documents to both splits."""
        found, meter = self._job.source, Meter()
        documents = found.documents(self._skipped, meter)
        if found.kind == "tail":
            document = next(documents)
            if document.size < 2:
                raise DataError(
                    f"{document.origin.source}: found {counted(document.size, 'byte')}, wanted at least 2: a part to "
                    "train on, and a part to validate on"
                )
            parts = text_parts(document, self._job.fraction, self._tokenizer, writer)
        else:
            parts = document_parts(self._chosen(documents), self._tokenizer, writer)
        with progress_bar(self._job.path.name, found.total_bytes, meter, self._job.quiet) as progress:
            write_parts(writer, parts, self._tokenizer, progress)
        if found.kind != "tail":
            self._check()

    def _chosen(self, documents: Iterator[Document]) -> Iterator[Chosen]:
        for document in documents:
            document, is_copy = self._copies.drop(document)
            yield document, None if is_copy else self._split.of(document)

    def _check(self) -> None:
        if self._split.documents == 0:
            why = "; ".join(self._skipped.lines())
            raise DataError(f"prepare: found no document, wanted at least two{f'; {why}' if why else ''}")
        self._split.check()

    def lines(self) -> list[str]:
        """Returns lines that say what was not read and what was left out."""
        return [*self._skipped.lines(), *self._copies.lines()]


def _tokenizer(job: Job) -> Tokenizer:
    """Returns the tokenizer; a vocabulary that is to be trained never sees the validation split."""
    name, eot = job.tokenizer, job.eot
    if not name.startswith(PREFIX):
        return load_tokenizer(name, eot=eot, instead=_OTHER_TOKENIZER, data_dir=job.data_dir)
    vocabulary_size(name)
    if eot is not None:
        raise DataError(f"--eot: found {eot!r}, wanted none: {name} has <|endoftext|>")
    found, meter, split = job.source, Meter(), job.hash_split()
    with progress_bar(f"{name}: the sample of the text", found.total_bytes, meter, job.quiet) as progress:

        def training() -> Iterator[bytes]:
            for document in found.documents(Skipped(), meter):
                progress(0)
                if found.kind == "tail":
                    yield from (piece for part, piece in tail_pieces(document, job.fraction) if part == "train")
                elif split.of(document) == "train":
                    yield from document.pieces

        return train_tokenizer(name, training())


def summary(path: str | os.PathLike[str], seconds: float) -> str:
    """Returns a few lines that describe the data set in the folder `path`; preparing it took `seconds`."""
    manifest = read_manifest(path)
    lines = [f"{path}: {manifest.source}; tokenizer {manifest.tokenizer.name}, {manifest.dtype}, {seconds:.1f} s"]
    total = sum(split.tokens for split in manifest.splits.values())
    for split in SPLITS:
        part = manifest.splits[split]
        share = 100 * part.tokens / max(total, 1)
        lines.append(
            f"  {split:5s} {counted(part.tokens, 'token'):>22} ({share:.2f}%)  "
            f"{counted(part.documents, 'document'):>20}  {counted(len(part.shards), 'shard'):>12}"
        )
    return "\n".join(lines)
