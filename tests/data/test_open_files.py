"""Processes that may open few files (`ulimit -n`)."""

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from checkpoint_helpers import in_child

from gptperf.data.prepare import prepare
from gptperf.data.shards import TokenSource, verify
from gptperf.errors import DataError, DiskError, main_guard


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A data set with more shards than the tests may open files."""
    (tmp_path / "text.txt").write_text("some words " * 100)
    return prepare(str(tmp_path / "text.txt"), data_dir=tmp_path, name="many", shard_tokens=10, quiet=True)


@pytest.fixture
def few() -> Iterator[int]:
    """Lets this process open three more files, and returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(map(int, os.listdir("/proc/self/fd"))) + 4
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_shards_than_files_may_be_open(many: Path, few: int) -> None:
    with TokenSource.open(many, "train") as train, TokenSource.open(many, "val") as val:
        for source in (train, val, train):
            tokens = np.empty(len(source), source.dtype)
            source.read_into(0, tokens)
            assert tokens[-1] == source.manifest.tokenizer.eot
    assert verify(many) == 1101 + 1


def test_a_source_leaves_files_for_others(many: Path) -> None:
    def work() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        before = len(os.listdir("/proc/self/fd"))
        with TokenSource.open(many, "train") as source:
            tokens = np.empty(len(source), source.dtype)
            source.read_into(0, tokens)
            assert len(os.listdir("/proc/self/fd")) - before <= 16

    assert in_child(work) == 0


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files", "log.json"),
        OSError(errno.EMFILE, None),
        ImportError("libtorch.so: cannot open shared object file: Too many open files"),
        DiskError("log.json cannot be written: [Errno 24] Too many open files"),
        DataError("shard: Too many open files"),
    ],
)
def test_every_command_names_the_limit(error: Exception, few: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, main_guard():
        raise error
    said = capsys.readouterr().err
    assert ended.value.code == 6
    assert f"the limit of this process is {few} open files" in said
    assert "ulimit -n" in said
    assert said.count("\n") == 1


def test_other_errors_keep_their_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, main_guard():
        raise DiskError("no space left")
    assert ended.value.code == 8
    with pytest.raises(FileNotFoundError), main_guard():
        raise FileNotFoundError(errno.ENOENT, "no such file")
