"""Prepares a data set from text: a file, a folder, JSON lines, the standard library, or Hugging Face.

Validation documents are chosen by their content: a document belongs to the validation split if the first 64 bits of its
SHA-256, divided by 2**64, are below `val_fraction`. So the split does not depend on the order of the files or on a
random state, and copies of a document are always in the same split. A single text file is one document, and its tail is
the validation split.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import itertools
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gptperf.data import sources
from gptperf.data.format import SPLITS, read_manifest
from gptperf.data.sources import KNOWN, not_text
from gptperf.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from gptperf.data.train_tokenizer import PREFIX, train_tokenizer, vocabulary_size
from gptperf.data.vocabulary import Tokens, as_text, pieces
from gptperf.data.writer import SHARD_TOKENS, ShardWriter, check_target
from gptperf.errors import DataError

__all__ = ["KNOWN", "prepare", "summary"]

DEFAULT_VAL_FRACTION = {"documents": 0.05, "tail": 0.1, "hub": 0.0005}
"""Kind of source -> default fraction. 5% of a few hundred documents are several documents; the other two are nanoGPT's
fractions for Shakespeare and OpenWebText."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TAIL, _HASH = "the tail of the text", "documents whose SHA-256 falls below val_fraction"
_OTHER_TOKENIZER = ", or use --tokenizer=byte, which needs no vocabulary"
_BATCH_DOCUMENTS = 256
_BATCH_BYTES = 8 << 20

Progress = Callable[[int, int], None]
"""Called with the numbers of documents and tokens so far."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Source:
    """A source of text, and how it is split. A source has either documents or a single text."""

    name: str
    """Default name of the data set."""
    source: str
    """Description for the manifest."""
    documents: Callable[[sources.Skipped], Iterator[bytes]] = lambda skipped: iter(())
    """Yields the documents and counts the skipped files."""
    text_file: Callable[[], Path] | None = None
    """Returns the path of a single text."""
    kind: str = "documents"
    """Key of `DEFAULT_VAL_FRACTION`."""
    has_fields: bool = False
    """Whether a document is one field of a record."""


def prepare(
    what: str,
    *,
    data_dir: str | os.PathLike[str] = "data",
    name: str | None = None,
    tokenizer: str = "byte",
    eot: str | None = None,
    val_fraction: float | None = None,
    overwrite: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    quiet: bool = False,
    shakespeare_url: str = sources.SHAKESPEARE_URL,
    split: str | None = None,
    text_field: str | None = None,
) -> Path:
    """Prepares the data set `what` and returns its folder, `data_dir`/`name`.

    Args:
        what: A name of `KNOWN`, "hf:REPO[:CONFIG]", or the path of a text file, a .jsonl file or a folder.
        data_dir: Folder of data sets.
        name: Name of the data set; None: derived from `what`.
        tokenizer: "train:N" for a BPE of N ids that is trained on the training split, or a name of `load_tokenizer`.
        eot: Token of the tokenizer that ends a document; None: the one that it names itself.
        val_fraction: Fraction of the validation split, above 0 and below 1; None: see `DEFAULT_VAL_FRACTION`.
        overwrite: Whether an existing data set is replaced.
        shard_tokens: Number of tokens in a full shard.
        quiet: Whether nothing is printed.
        shakespeare_url: URL of "shakespeare".
        split: Split of a Hugging Face data set; None: "train".
        text_field: Field of a Hugging Face data set or .jsonl file that has the text; None: "text".

    Raises:
        DataError: `what` or `tokenizer` is unknown or unreadable; `what` is too small or lacks the field; the data set
            exists; a download failed; the tokenizer refuses a document.
        DeviceError: A package that `what` or the tokenizer needs is not installed.
        DiskError: The disk is full or cannot be written.
    """
    begin = time.perf_counter()
    found = _find_source(what, data_dir, shakespeare_url, split or "train", text_field or "text")
    name = found.name if name is None else name
    fraction = DEFAULT_VAL_FRACTION[found.kind] if val_fraction is None else val_fraction
    _check_options(what, found, split, text_field, name, fraction)
    path = Path(data_dir) / name
    check_target(path.resolve(), overwrite)
    encoder = _tokenizer(tokenizer, eot, found, fraction, quiet)
    writer = ShardWriter(
        path,
        tokenizer=encoder,
        source=found.source,
        val_fraction=fraction,
        split_method=_TAIL if found.text_file else _HASH,
        shard_tokens=shard_tokens,
        overwrite=overwrite,
    )
    with writer, _progress(name, quiet) as progress:
        skipped = _write(writer, encoder, found, fraction, progress)
    if not quiet:
        lines = [f"skipped {count} files: {reason}" for reason, count in sorted(skipped.items())]
        print("\n".join([*lines, summary(path, time.perf_counter() - begin)]))
    return path


def _tokenizer(name: str, eot: str | None, found: _Source, fraction: float, quiet: bool) -> Tokenizer:
    """Returns the tokenizer; a vocabulary that is to be trained never sees the validation split."""
    if not name.startswith(PREFIX):
        return load_tokenizer(name, eot=eot, instead=_OTHER_TOKENIZER)
    vocabulary_size(name)
    if eot is not None:
        raise DataError(f"--eot: found {eot!r}, wanted none: {name} has <|endoftext|>")
    with _progress(f"{name}: the sample of the text", quiet) as progress:
        if found.text_file:
            path = found.text_file()
            documents: Iterator[bytes] = sources.text_pieces(path, 0, _tail_begin(path, fraction))
        else:
            documents = (data for data in found.documents({}) if _hash_fraction(data) >= fraction)
        return train_tokenizer(name, _shown(documents, progress))


def _shown(documents: Iterable[bytes], progress: Progress) -> Iterator[bytes]:
    for number, document in enumerate(documents, 1):
        progress(number, 0)
        yield document


def _check_options(
    what: str, found: _Source, split: str | None, text_field: str | None, name: str, fraction: float
) -> None:
    if split is not None and found.kind != "hub":
        raise DataError(f"--split: found {split!r}, wanted none: {what} is not a Hugging Face data set")
    if text_field is not None and not found.has_fields:
        raise DataError(f"--text_field: found {text_field!r}, wanted none: {what} has no fields")
    if not _NAME.fullmatch(name):
        raise DataError(
            f"--name: found {name!r}, wanted a letter or digit, then at most 63 letters, digits, '.', '_' or '-'"
        )
    if not 0 < fraction < 1:
        raise DataError(
            f"--val_fraction: found {fraction}, wanted 0 < val_fraction < 1, as training needs a validation split; "
            f"nearest: --val_fraction={0.999 if fraction >= 1 else 0.001}"
        )


def summary(path: str | os.PathLike[str], seconds: float) -> str:
    """Returns a few lines that describe the data set in the folder `path`; preparing it took `seconds`."""
    manifest = read_manifest(path)
    lines = [f"{path}: {manifest.source}; tokenizer {manifest.tokenizer.name}, {manifest.dtype}, {seconds:.1f} s"]
    total = sum(split.tokens for split in manifest.splits.values())
    for split in SPLITS:
        part = manifest.splits[split]
        share = 100 * part.tokens / max(total, 1)
        lines.append(
            f"  {split:5s} {part.tokens:>15,} tokens ({share:.2f}%)  {part.documents:>10,} documents  "
            f"{len(part.shards):>5} shards"
        )
    return "\n".join(lines)


def _find_source(what: str, data_dir: str | os.PathLike[str], shakespeare_url: str, split: str, field: str) -> _Source:
    if what == "python_stdlib":
        return _Source(
            name=what,
            source=f"standard library of {sources.python_version()}",
            documents=sources.python_stdlib,
        )
    if what == "shakespeare":
        return _Source(
            name=what,
            source=shakespeare_url,
            text_file=lambda: sources.download_shakespeare(shakespeare_url, data_dir),
            kind="tail",
        )
    if what in sources.HUGGING_FACE or what.startswith("hf:"):
        repo, config = sources.HUGGING_FACE.get(what) or sources.parse_hub_name(what)
        name = what if what in sources.HUGGING_FACE else repo.rpartition("/")[2]
        return _Source(
            name=name,
            source=", ".join(filter(None, (f"Hugging Face {repo}", config, "" if split == "train" else split))),
            documents=lambda skipped: sources.hub_documents(repo, config, split, field),
            kind="hub",
            has_fields=True,
        )
    path = Path(what)
    if os.path.isdir(path):
        return _Source(
            name=path.resolve().name,
            source=f"folder {path.name}",
            documents=lambda skipped: sources.folder_documents(path, skipped, without=Path(data_dir)),
        )
    if os.path.isfile(path) and not os.access(path, os.R_OK):
        raise DataError(f"{path}: cannot be read: permission denied")
    other = not_text(path) if os.path.isfile(path) else None
    if other is not None:
        raise DataError(other)
    if os.path.isfile(path) and path.suffix == ".jsonl":
        return _Source(
            name=path.stem,
            source=f"file {path.name}",
            documents=lambda skipped: sources.jsonl_documents(path, field),
            has_fields=True,
        )
    if os.path.isfile(path):
        return _Source(name=path.stem, source=f"file {path.name}", text_file=lambda: path, kind="tail")
    near = difflib.get_close_matches(what, KNOWN, n=1, cutoff=0.4)
    hint = f"; nearest: {near[0]!r}" if near else ""
    raise DataError(f"prepare: found {what!r}, wanted a file, a folder, hf:REPO or one of {', '.join(KNOWN)}{hint}")


def _write(
    writer: ShardWriter, tokenizer: Tokenizer, found: _Source, fraction: float, progress: Progress
) -> sources.Skipped:
    """Writes both splits, and returns the counts of the skipped files."""
    skipped: sources.Skipped = {}
    if found.text_file:
        _write_tail_split(writer, tokenizer, found.text_file(), fraction, progress)
    else:
        _write_documents(writer, tokenizer, found.documents(skipped), fraction, progress, skipped)
    return skipped


def _write_documents(
    writer: ShardWriter,
    tokenizer: Tokenizer,
    documents: Iterable[bytes],
    fraction: float,
    progress: Progress,
    skipped: sources.Skipped,
) -> None:
    """Writes documents to both splits; the docstring of the module says how validation documents are chosen."""
    count, low, high = 0, 1.0, 0.0

    def write(batch: list[bytes], encoded: Iterator[Tokens]) -> None:
        nonlocal count, low, high
        for document in batch:
            count += 1
            tokens = _next(encoded, f"document {count}")
            position = _hash_fraction(document)
            low, high = min(low, position), max(high, position)
            writer.add("val" if position < fraction else "train", tokens)
        progress(count, sum(writer.counts(split)[0] for split in SPLITS))

    with ThreadPoolExecutor(_threads(tokenizer)) as pool:
        before: tuple[list[bytes], Iterator[Tokens]] | None = None
        for batch in _batches(documents):
            encoded = pool.map(tokenizer.encode, batch)  # runs while the batch before it is written
            if before is not None:
                write(*before)
            before = batch, encoded
        if before is not None:
            write(*before)
    if count == 0:
        why = ", ".join(f"{number} x {reason}" for reason, number in sorted(skipped.items()))
        raise DataError(f"prepare: found no document, wanted at least two{f'; skipped: {why}' if why else ''}")
    if not low < fraction <= high:
        raise DataError(_empty_split(count, low, high, fraction))


def _empty_split(count: int, low: float, high: float, fraction: float) -> str:
    """Returns the error of documents that are all in one split.

    Args:
        count: number of documents.
        low: lowest position of a document; `fraction` must be above it.
        high: highest position of a document; `fraction` must not be above it.
        fraction: what the user gave.
    """
    single = "give the text as a single .txt file, whose tail is the validation split"
    if low == high:
        found = "1 document" if count == 1 else f"{count} copies of one document"
        return f"prepare: found {found}, wanted different ones for training and validation; {single}"
    empty = "training" if high < fraction else "validation"
    near = _between(low, high, nearer_low=fraction <= low)
    return (
        f"prepare: the {empty} split of {count} documents is empty at --val_fraction={fraction:g}, wanted at least one "
        f"document in each; --val_fraction={near} puts one there, or {single}"
    )


def _between(low: float, high: float, *, nearer_low: bool) -> str:
    """Returns a number with few digits that is above `low` and not above `high`, next to one of them."""
    for digits in range(3, 18):
        scale = 10**digits
        near = math.floor(low * scale) + 1 if nearer_low else math.floor(high * scale)
        text = f"{near / scale:.{digits}f}"
        if low < float(text) <= high:
            return text
    return repr(high)


def _write_tail_split(
    writer: ShardWriter, tokenizer: Tokenizer, path: Path, fraction: float, progress: Progress
) -> None:
    """Writes a single text, its head to the training split and its tail to the validation split."""
    size, cut = path.stat().st_size, _tail_begin(path, fraction)
    with ThreadPoolExecutor(_threads(tokenizer)) as pool:
        for split, begin, end in (("train", 0, cut), ("val", cut, size)):
            if begin == end:
                continue
            for text in sources.text_pieces(path, begin, end):
                parts = [text]
                if not isinstance(tokenizer, ByteTokenizer):
                    parts = [part.encode() for part in pieces(as_text(tokenizer.name, text))]
                encoded = pool.map(tokenizer.encode, parts)
                for part in parts:
                    writer.append(split, _next(encoded, f"{path}, in the {len(part):,} bytes at byte {begin:,}"))
                    begin += len(part)
                progress(0, sum(writer.counts(part)[0] for part in SPLITS))
            writer.end_document(split)


def _next(encoded: Iterator[Tokens], where: str) -> Tokens:
    """Returns the next tokens; an error of the tokenizer names the place of the text."""
    try:
        return next(encoded)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _tail_begin(path: Path, fraction: float) -> int:
    """Returns the offset at which the validation split of a single text begins.

    Raises:
        DataError: The text is too short to be split.
    """
    size = path.stat().st_size
    if size < 2:
        raise DataError(f"{path}: found {size} bytes, wanted a text to train on and to validate on")
    # nanoGPT cuts at int(n * 0.9) characters; this is the same place for ASCII, where a character is a byte.
    return sources.character_start(path, max(1, min(size - 1, int(size * (1 - fraction)))))


def _threads(tokenizer: Tokenizer) -> int:
    """Returns the number of threads that encode: the libraries encode without the GIL; bytes need no encoding."""
    return 1 if isinstance(tokenizer, ByteTokenizer) else len(os.sched_getaffinity(0))


def _batches(documents: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Yields lists of documents; the threads of the tokenizer encode one list at a time."""
    batch: list[bytes] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if len(batch) == _BATCH_DOCUMENTS or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _hash_fraction(document: bytes) -> float:
    """Returns the first 64 bits of the document's SHA-256, divided by 2**64."""
    return int.from_bytes(hashlib.sha256(document).digest()[:8], "big") / 2**64


@contextlib.contextmanager
def _progress(name: str, quiet: bool) -> Iterator[Progress]:
    """Shows a line of progress on a terminal, and nothing elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda documents, tokens: None
        return
    ticks = itertools.count()
    with console.status(f"{name}: reading") as status:

        def show(documents: int, tokens: int) -> None:
            if next(ticks) % 4 == 0:
                status.update(f"{name}: {tokens:,} tokens" + (f", {documents:,} documents" if documents else ""))

        yield show
