"""Files that are replaced as a whole, leftovers of killed processes, the lock of a run directory, free disk space."""

import contextlib
import errno
import json
import os
import shutil
import signal
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_helpers import in_child

from gptperf import files
from gptperf.errors import CheckpointError, DiskError
from gptperf.files import append_line, make_temporary, new_folder, remove_leftovers, replace_text, replacing
from gptperf.monitor.run_lock import RunLock


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "log.json"
    texts = {letter * 300_000 for letter in "abcd"}
    replace_text(path, "a" * 300_000)
    done = threading.Event()

    def write() -> None:
        for _ in range(2):
            for text in texts:
                replace_text(path, text)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    while not done.is_set() or reads == 0:
        assert path.read_text() in texts
        reads += 1
    writer.join()
    assert os.listdir(path.parent) == ["log.json"]


def test_the_text_comes_back_unchanged(tmp_path: Path) -> None:
    text = "one\r\ntwo\nthree\r\u00e9"
    replace_text(tmp_path / "text", text)
    assert (tmp_path / "text").read_bytes() == text.encode()


@pytest.mark.parametrize("step", ["write", "fsync", "rename"])
def test_a_failed_write_keeps_the_old_file_and_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "page.html"
    replace_text(path, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "rename":
        monkeypatch.setattr(os, "replace", full)
    if step == "fsync":
        monkeypatch.setattr(os, "fsync", full)

    def write_half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half of the n")
            if step == "write":
                full()

    with pytest.raises(DiskError, match=r"page\.html cannot be written: .*No space left"):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["page.html"]


def test_an_error_of_the_body_passes_through(tmp_path: Path) -> None:
    def fail() -> None:
        with replacing(tmp_path / "page.html") as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert os.listdir(tmp_path) == []


def test_the_file_is_durable_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, events = tmp_path / "page.html", []
    fsync, rename = os.fsync, os.replace

    def logged_fsync(fd: int) -> None:
        events.append("directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else f"{os.fstat(fd).st_size} bytes")
        fsync(fd)

    def logged_rename(source: Path, target: Path) -> None:
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_rename)
    replace_text(path, "12345")
    assert events == ["5 bytes", "rename", "directory"]


def test_a_line_after_a_torn_one_is_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "index.jsonl"
    path.write_bytes(b"whole\nto")
    append_line(path, b"next")
    append_line(path, b"last")
    assert path.read_bytes() == b"whole\nto\nnext\nlast\n"


def test_a_second_run_is_refused(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run"):
        holder = json.loads((tmp_path / "run" / "run.lock").read_text())
        assert holder["pid"] == os.getpid()
        assert holder.keys() == {"pid", "host", "boot_id", "start_time"}
        with (
            pytest.raises(CheckpointError, match=rf"run is live on .* \(pid {os.getpid()}"),
            RunLock(tmp_path / "run"),
        ):
            pass
    with RunLock(tmp_path / "run"):
        pass


def test_a_killed_process_frees_the_lock_even_if_its_child_lives(tmp_path: Path) -> None:
    ready, alive = os.pipe(), os.pipe()

    def hold() -> None:
        RunLock(tmp_path).__enter__()
        if os.fork() == 0:
            os.close(alive[1])
            os.write(ready[1], b"x")
            os.read(alive[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(hold) == -signal.SIGKILL
    try:
        with RunLock(tmp_path):
            pass
    finally:
        for fd in (*ready, *alive):
            os.close(fd)


def test_two_processes_race_for_the_lock(tmp_path: Path) -> None:
    for attempt in range(25):
        directory = tmp_path / str(attempt)
        start, won, done = os.pipe(), os.pipe(), os.pipe()
        children = []
        for _ in range(2):
            pid = os.fork()
            if pid == 0:
                code = 9
                try:
                    os.read(start[0], 1)
                    try:
                        with RunLock(directory):
                            os.write(won[1], b"w")
                            os.read(done[0], 1)
                            code = 0
                    except CheckpointError as error:
                        code = 4 if "run is live on" in str(error) else 8
                        os.write(done[1], b"d")
                finally:
                    os._exit(code)
            children.append(pid)
        os.write(start[1], b"gg")
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children)
        for fd in (*start, *won, *done):
            os.close(fd)
        assert codes == [0, 4]


def test_lock_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError), RunLock(tmp_path / "file"):
        pass


def test_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = tmp_path / "a" / "b"
    free = files.free_bytes(absent)
    assert 0 < free <= shutil.disk_usage(tmp_path).total
    monkeypatch.setattr(files, "free_bytes", lambda directory: 1000)
    assert files.check_space(absent, 500) == 2
    assert files.check_space(absent, 0) >= 2
    with pytest.raises(DiskError, match="two checkpoints"):
        files.check_space(absent, 501)


# Temporary files of killed and of living processes.


def killed(work: Callable[[], object]) -> None:
    """Runs `work` in another process, which is killed at its end."""

    def work_and_die() -> None:
        work()
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(work_and_die) == -signal.SIGKILL


def temporaries(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if ".tmp-" in name]


def test_the_next_write_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    def write_half() -> None:
        stack = contextlib.ExitStack()
        stack.enter_context(replacing(tmp_path / "page.html")).write_text("half")
        folder, _ = make_temporary(tmp_path / "set", folder=True)
        (folder / "shard").write_text("half")
        assert len(temporaries(tmp_path)) == 2
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(write_half) == -signal.SIGKILL
    assert len(temporaries(tmp_path)) == 2
    replace_text(tmp_path / "another.html", "whole")
    assert os.listdir(tmp_path) == ["another.html"]


def test_a_new_folder_has_all_its_files_or_does_not_exist(tmp_path: Path) -> None:
    target = tmp_path / "parent" / "model"

    def fill(end: Callable[[], object]) -> None:
        with new_folder(target) as folder:
            (folder / "one").write_text("1")
            assert not (target / "one").exists()
            end()
            (folder / "two").write_text("2")

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert in_child(lambda: fill(lambda: os.kill(os.getpid(), signal.SIGKILL))) == -signal.SIGKILL
    assert len(temporaries(target.parent)) == 1
    with pytest.raises(DiskError, match=r"model cannot be written: .*No space left") as e:
        fill(full)
    assert e.value.full
    assert os.listdir(target.parent) == []
    target.mkdir()
    fill(lambda: None)
    assert sorted(os.listdir(target)) == ["one", "two"]
    (target / "two").write_text("kept")
    with pytest.raises(DiskError, match="model cannot be written"), new_folder(target) as folder:
        (folder / "two").write_text("other")  # another process was faster
    assert (target / "two").read_text() == "kept"
    assert os.listdir(target.parent) == ["model"]


def test_the_lock_of_a_run_removes_what_a_killed_run_left(tmp_path: Path) -> None:
    killed(lambda: make_temporary(tmp_path / "run_1.json"))
    assert temporaries(tmp_path)
    with RunLock(tmp_path):
        assert os.listdir(tmp_path) == ["run.lock"]


@pytest.mark.parametrize("folder", [False, True])
def test_what_a_living_process_writes_is_left_alone(tmp_path: Path, folder: bool) -> None:
    """Until it ends, however it ends; the number of its process says nothing."""
    ready, leave = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(leave[1])  # so that a test that fails ends this process too
        make_temporary(tmp_path / "set", folder=folder)
        os.write(ready[1], b"x")
        os.read(leave[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    _, lock = make_temporary(tmp_path / "set", folder=folder)  # of this process, which is alive too
    replace_text(tmp_path / "page.html", "whole")
    assert len(temporaries(tmp_path)) == 2
    os.close(lock)
    os.write(leave[1], b"x")
    os.waitpid(pid, 0)
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["page.html"]
    for fd in (*ready, *leave):
        os.close(fd)


def test_only_temporaries_are_leftovers(tmp_path: Path) -> None:
    kept = [".tmp-00000003-0123abcd", "a.tmp-0123abcd", ".a.tmp-0123abc", ".a.tmp-0123abcdef", ".tmp-0123abcd"]
    for name in kept:
        (tmp_path / name).write_text("")
    (tmp_path / "elsewhere").write_text("not ours")
    (tmp_path / ".link.tmp-0123abcd").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / ".pipe.tmp-0123abcd")  # opening it must not block
    remove_leftovers(tmp_path)
    assert {*kept, "elsewhere", ".link.tmp-0123abcd"} <= set(os.listdir(tmp_path))
    assert (tmp_path / "elsewhere").read_text() == "not ours"
    remove_leftovers(tmp_path / "absent")


def test_writers_and_cleaners_race(tmp_path: Path) -> None:
    """No cleaner takes a temporary file away from a writer, not even before the writer has locked it."""
    stop = threading.Event()

    def clean() -> None:
        while not stop.is_set():
            remove_leftovers(tmp_path)

    cleaner = threading.Thread(target=clean)
    cleaner.start()
    try:
        for count in range(60):
            replace_text(tmp_path / "page", str(count))
            assert (tmp_path / "page").read_text() == str(count)
            folder, lock = make_temporary(tmp_path / "set", folder=True)
            (folder / "shard").write_text("x")
            files.delete(folder)
            os.close(lock)
    finally:
        stop.set()
        cleaner.join()
    assert os.listdir(tmp_path) == ["page"]


def test_where_locks_do_not_work_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    left, _ = make_temporary(tmp_path / "page.html")
    replace_text(tmp_path / "page.html", "whole")
    assert sorted(os.listdir(tmp_path)) == [left.name, "page.html"]
