"""The lock of a run and the room on its disk."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from checkpoint_helpers import in_child

from gptperf import files
from gptperf.errors import CheckpointError, DiskError
from gptperf.files import RunLock


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
