"""A data set is written completely or not at all, and is found by its name or path."""

import itertools
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_helpers import in_child

from gptperf.data import writer
from gptperf.data.format import read_manifest
from gptperf.data.shards import resolve_dataset, verify
from gptperf.data.tokenizers import ByteTokenizer
from gptperf.data.writer import ShardWriter
from gptperf.errors import DataError, DiskError

BYTE = ByteTokenizer()


def write(path: Path, train: list[list[int]], val: list[list[int]], **kwargs: Any) -> Path:
    with ShardWriter(path, tokenizer=BYTE, source="test", val_fraction=0.5, split_method="by hand", **kwargs) as out:
        for split, documents in (("train", train), ("val", val)):
            for document in documents:
                out.add(split, np.array(document, np.int64))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three training shards of 16, 16 and 8 tokens and one of validation."""
    return write(tmp_path / "set", [list(range(19)), list(range(100, 119))], [[7, 8, 9]], shard_tokens=16)


# Writing: all or nothing.


@pytest.mark.parametrize("rename", range(3))
def test_the_next_writer_cleans_up_after_a_killed_one(data: Path, monkeypatch: pytest.MonkeyPatch, rename: int) -> None:
    """Killed before or between the renames of a commit, a writer leaves the old data set to the next one."""
    before = {path.name: path.read_bytes() for path in data.iterdir()}
    real, count = Path.rename, itertools.count()

    def killed(source: Path, target: Path) -> Path:
        if next(count) == rename:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(source, target)

    def replace() -> None:
        monkeypatch.setattr(Path, "rename", killed)
        if rename == 2:  # after both renames, before the old data set is removed
            monkeypatch.setattr(writer.shutil, "rmtree", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        write(data, [[1, 2]], [[3]], overwrite=True)

    assert in_child(replace) == -signal.SIGKILL
    assert len(list(data.parent.iterdir())) == 2  # the other data set, and the old one if that was set aside
    with pytest.raises(DataError, match="this data set exists"):
        write(data, [[5]], [[6]])
    assert list(data.parent.iterdir()) == [data]
    if rename < 2:
        assert {path.name: path.read_bytes() for path in data.iterdir()} == before
    else:
        assert verify(data) == 5
    write(data.parent / "other", [[1, 2]], [[3]])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted_writer_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    seen = []

    def interrupted() -> None:
        with ShardWriter(
            tmp_path / "set", tokenizer=BYTE, source="", val_fraction=0.0, split_method="", shard_tokens=4
        ) as out:
            for _ in range(5):
                out.add("train", np.arange(3))
                seen.append((tmp_path / "set").exists())
            raise error

    with pytest.raises(error):
        interrupted()
    assert seen == [False] * 5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", range(13))
def test_failing_commit_keeps_the_old_data_set(data: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Each fsync and each rename of a commit fails in turn: the old set stays whole, or the new one is."""
    before = {path.name: path.read_bytes() for path in data.iterdir()}
    calls = 0

    def failing(real: Any) -> Any:
        def wrapper(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call + 1:
                raise OSError(28, "No space left on device")
            return real(*args)

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(writer.os, "fsync", failing(os.fsync))
        patch.setattr(Path, "rename", failing(Path.rename))
        if call < 12:
            with pytest.raises(DiskError, match="No space left on device"):
                write(data, [[1]], [[2]], overwrite=True)
        else:
            write(data, [[1]], [[2]], overwrite=True)
            assert calls == 12  # the two shards, five other files, manifest, folder, two renames, parent folder
    after = {path.name: path.read_bytes() for path in data.iterdir()}
    assert (after == before) == (call < 11)
    assert verify(data) == (44 if call < 11 else 4)
    assert [path.name for path in data.parent.iterdir()] == ["set"]


def test_existing_data_set_is_replaced_only_when_asked(data: Path) -> None:
    with pytest.raises(DataError, match="exists; wanted another --name, or --overwrite=True to replace it"):
        write(data, [[1]], [])
    assert verify(data) == 44
    write(data, [[1]], [], overwrite=True)
    assert verify(data) == 2


def test_a_folder_that_is_no_data_set_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").write_text("ten years")
    with pytest.raises(DataError, match="never replaced"):
        write(tmp_path / "thesis", [[1]], [], overwrite=True)
    assert (tmp_path / "thesis" / "chapter1").read_text() == "ten years"


def test_data_set_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "set"

    def race() -> None:
        with ShardWriter(path, tokenizer=BYTE, source="", val_fraction=0.0, split_method="") as out:
            out.add("train", np.arange(3))
            write(path, [[1, 2, 3, 4]], [])

    with pytest.raises(DataError, match="exists"):
        race()
    assert verify(path) == 5
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]


def test_data_dir_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot be written"):
        write(tmp_path / "file" / "set", [[1]], [])


# Names.


def test_resolve_by_name_and_by_path(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = data.parent
    assert resolve_dataset("set", root) == data
    assert resolve_dataset(str(data), "elsewhere") == data
    monkeypatch.chdir(root)
    assert resolve_dataset("set", "elsewhere") == Path("set")
    assert resolve_dataset("./set", "elsewhere") == Path("set")


def test_resolve_names_the_command_and_the_nearest(data: Path) -> None:
    root = data.parent
    with pytest.raises(DataError, match=f"nearest prepared: set; .*gptperf.prepare PATH --name=sett --data_dir={root}"):
        resolve_dataset("sett", str(root))
    with pytest.raises(DataError, match="prepared: set"):
        resolve_dataset("openwebtext", root)
    with pytest.raises(DataError, match="nothing is prepared in nowhere"):
        resolve_dataset("openwebtext", "nowhere")
    with pytest.raises(DataError, match=r"at some/where; "):
        resolve_dataset("some/where", root)
    with pytest.raises(DataError, match="prepare a data set"):
        read_manifest(root / "none")
