"""Advice in error messages: a reader who does what the message says comes to the end."""

import bz2
import gzip
import lzma
import math
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_helpers import documents, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from gptperf import prepare as command
from gptperf.data import split as splitting
from gptperf.data.loader import validation_batches
from gptperf.data.order import BatchOrder
from gptperf.data.prepare import prepare
from gptperf.data.shards import TokenSource
from gptperf.errors import DataError

TEXT = "A line of text, with caf\u00e9.\n" * 40
FRACTION = re.compile(r"--val_fraction=([\d.e-]+)")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def error_of(function: Callable[..., object], *args: Any, **kwargs: Any) -> str | None:
    """The message of a call that fails."""
    try:
        function(*args, **kwargs)
    except DataError as error:
        return str(error)
    return None


def followed(what: str, fraction: float, name: str = "set") -> int:
    """Prepares, and follows `--val_fraction=X` of each error; returns how often. Stops with an error after three."""
    for step in range(4):
        error = error_of(prepare, what, name=name, val_fraction=fraction, overwrite=True, quiet=True)
        if error is None:
            path = Path("data", name)
            assert documents(path, "train")
            assert documents(path, "val")
            return step
        found = FRACTION.findall(error.partition("; ")[2])
        assert found, error
        fraction = float(found[-1])
    raise AssertionError(f"the advice for {what} does not come to an end")


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.text("abc\u00e9", min_size=1, max_size=3), min_size=2, max_size=5, unique=True),
    st.floats(1e-9, 0.999999999),
)
def test_the_advice_for_an_empty_split_is_right_at_once(texts: list[str], fraction: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert followed(str(write_jsonl(Path(folder, "few.jsonl"), texts)), fraction) <= 1
    assert [entry.name for entry in Path("data").iterdir()] == ["set"]


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 2**53), st.booleans())
def test_a_fraction_between_positions_that_are_close(low: float, steps: int, nearer_low: bool) -> None:
    high = min(low + steps * math.ulp(low), 1 - 2**-53)
    if low < high:
        assert low < float(splitting._between(low, high, nearer_low=nearer_low)) <= high


@pytest.mark.parametrize("count", [1, 3])
def test_copies_of_one_document_are_told_as_such_and_the_single_file_works(count: int) -> None:
    write_jsonl(Path("one.jsonl"), [TEXT] * count)
    for fraction in (0.0366, 0.9):
        with pytest.raises(DataError, match=r"found 1 document, .*single \.txt file") as e:
            prepare("one.jsonl", val_fraction=fraction, quiet=True)
        assert "--val_fraction" not in str(e.value)
    Path("one.txt").write_text(TEXT)
    assert followed("one.txt", 0.0366) == 0


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.0, 1.5, math.inf, math.nan])
def test_a_fraction_that_leaves_a_split_empty_is_refused(fraction: float) -> None:
    Path("text.txt").write_text("hello")
    write_jsonl(Path("few.jsonl"), [f"document {i}" for i in range(4)])
    for what in ("text.txt", "few.jsonl"):
        with pytest.raises(DataError, match="wanted 0 < val_fraction < 1"):
            prepare(what, val_fraction=fraction, quiet=True)
        assert followed(what, fraction) > 0


def _packed(kind: str) -> Path:
    """Writes TEXT, twice where the format holds several files, in a file whose name needs quotes in a shell."""
    path = Path(f"it's my text.{kind}")
    data = TEXT.encode()
    inner = {name: Path(name) for name in ("one.txt", "two.txt")}
    match kind:
        case "gz" | "tgz" | "no_suffix":
            path = path if kind != "no_suffix" else Path("a corpus")
            path.write_bytes(gzip.compress(data))
        case "xz":
            path.write_bytes(lzma.compress(data))
        case "bz2":
            path.write_bytes(bz2.compress(data))
        case "zip" | "tar" | "tar.gz":
            for number, file in enumerate(inner.values()):
                file.write_text(TEXT * (number + 1))
            if kind == "zip":
                with zipfile.ZipFile(path, "w") as packed:
                    for name in inner:
                        packed.write(name)
            else:
                with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as bundle:
                    for name in inner:
                        bundle.add(name)
        case "utf16" | "utf16le" | "latin1":
            path.write_bytes(TEXT.encode({"utf16": "utf-16", "utf16le": "utf-16-le", "latin1": "latin-1"}[kind]))
        case "sqlite":
            with sqlite3.connect(path) as database:
                database.execute("create table t (text)")
                database.execute("insert into t values (?)", (TEXT,))
    return path


PACKED = ["bz2", "zip", "tar", "tar.gz", "utf16le", "latin1", "sqlite"]
READ = ["gz", "tgz", "no_suffix", "xz", "utf16"]


@pytest.mark.parametrize("kind", READ)
def test_a_file_is_read_whatever_its_name_leaves_open(kind: str) -> None:
    path = prepare(str(_packed(kind)), name="set", quiet=True)
    assert b"".join(documents(path, "train") + documents(path, "val")) == TEXT.encode()


@pytest.mark.parametrize("kind", PACKED)
def test_a_file_that_is_no_text_becomes_one_by_the_command_of_the_message(kind: str) -> None:
    path, ran = _packed(kind), 0
    while error := error_of(prepare, str(path), name="set", val_fraction=0.4, quiet=True):
        if "--val_fraction=" in error:  # of the two files in an archive
            assert followed(str(path), 0.4) == 1
            break
        assert ran < 2, error
        line = error.rpartition("text of it: " if "text of it: " in error else "convert it: ")[2]
        words = shlex.split(line)
        if words[0] != "python" and shutil.which(words[0]) is None:
            pytest.skip(f"no {words[0]} here")
        line = line.replace("python -m", f"{shlex.quote(sys.executable)} -m")
        subprocess.run(["sh", "-c", line], check=True)
        path, ran = Path(words[-1]), ran + 1
    assert ran > 0
    assert TEXT.encode()[:20] in b"".join(documents(Path("data/set"), "train") + documents(Path("data/set"), "val"))


@pytest.mark.parametrize(
    ("start", "name"),
    [(b"PK\x03\x04", "zip"), (b"%PDF-1.7\n", "PDF"), (b"\x7fELF", "executable")],
)
def test_other_formats_are_named(start: bytes, name: str) -> None:
    Path("corpus.jsonl").write_bytes(start + b"text " * 99)
    Path("notes").mkdir()
    Path("notes/a.bin").write_bytes(start + b"\0\xff" * 99)
    with pytest.raises(DataError, match=rf"corpus\.jsonl: found {name} data, wanted text"):
        prepare("corpus.jsonl")
    with pytest.raises(DataError, match=r"found no document, .*not read: 1 file: (binary|not UTF-8)"):
        prepare("notes")


def first_batch(path: Path, block_size: int) -> None:
    """What a run needs of a data set."""
    with TokenSource.open(path, "val") as val, TokenSource.open(path, "train") as train:
        next(validation_batches(val, block_size=block_size, batch_size=1, max_batches=1, rank=0, world_size=1))
        BatchOrder(len(train), block_size, seed=1)


@pytest.mark.parametrize("size", [30, 400, 3000, 40_000])
def test_the_advice_for_a_split_that_is_too_short_leads_to_a_batch(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is followed is the block size in one turn and the data set in the other."""
    for again in (False, True):
        Path("text.txt").write_text(("0123456789" * size)[:size])
        path = prepare("text.txt", val_fraction=0.001, overwrite=True, quiet=True)
        block_size = 1024
        for _ in range(6):
            error = error_of(first_batch, path, block_size)
            if error is None:
                break
            prepared_again = re.search(r"again with (--val_fraction=\S+) (--overwrite=\S+)", error)
            shorter = re.search(r"--block_size=(\d+)", error)
            assert prepared_again or shorter, error
            if prepared_again and (again or not shorter):
                command.main(["text.txt", *prepared_again.groups()])
            elif shorter:
                block_size = int(shorter[1])
        else:
            raise AssertionError("the advice does not come to an end")
