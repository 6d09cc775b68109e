"""The journal: torn lines, resumed runs, strict JSON, a disk that fails."""

import datetime
import errno
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gptperf.errors import ConfigError, DataError, DiskError
from gptperf.monitor.events import EVENTS, SCHEMA_VERSION, RunLog
from gptperf.monitor.journal import Journal, assemble, find_journal, new_run_name, newest_log, write_json

NAME = "run_20250103_143022"
ZONES = ("UTC", "Pacific/Kiritimati", "America/Los_Angeles")
GMTIME = time.gmtime


def iteration(log: Journal, step: int, **fields: Any) -> None:
    log.write("iteration", dict(iter=step, loss=step / 7, time_ms=0.1 * step, lr=6e-4, **fields))


def iters(log: RunLog, key: str = "training_iterations") -> list[int]:
    return [entry["iter"] for entry in log[key]]  # type: ignore[literal-required]


def fill(directory: Path) -> Path:
    with Journal(directory, NAME) as log:
        log.write(
            "start",
            dict(config={"n_layer": 12, "origins": {"n_layer": "file"}}, startup_info={"params": 124_373_760}),
        )
        for step in (1, 2, 3):
            iteration(log, step, mfu={"mfu_percent": 32.5, "convention": "causal"}, memory={"peak_gb": 1.5})
        log.write("eval", dict(iter=3, val_loss=0.75))
        log.write("checkpoint", dict(iter=3, path="checkpoints/step-00000003", val_loss=0.75))
        log.write("message", dict(level="warning", text='\u00e9\u2028 "quoted"\nsecond line', iter=3))
        log.write("summary", {"iterations": 3})
    return log.path


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def test_the_description_schema(tmp_path: Path) -> None:
    log = assemble(fill(tmp_path))
    assert log["run_name"] == NAME
    time.strptime(log["start_time"], "%Y-%m-%dT%H:%M:%SZ")
    assert log["config"] == {"n_layer": 12, "origins": {"n_layer": "file"}}
    assert log["startup_info"] == {"params": 124_373_760}
    assert log["training_iterations"][1] == {
        "iter": 2,
        "loss": 2 / 7,
        "time_ms": 0.2,
        "lr": 6e-4,
        "mfu": {"mfu_percent": 32.5, "convention": "causal"},
        "memory": {"peak_gb": 1.5},
    }
    assert log["eval_steps"] == [{"iter": 3, "val_loss": 0.75}]
    assert log["checkpoints"] == [{"iter": 3, "path": "checkpoints/step-00000003", "val_loss": 0.75}]
    assert log["messages"][0]["text"] == '\u00e9\u2028 "quoted"\nsecond line'
    assert log["summary"] == {"iterations": 3}
    assert (log["damaged_lines"], log["ignored_events"], log["resumes"]) == (0, 0, [])
    assert log["schema_version"] == SCHEMA_VERSION
    assert log.keys() == RunLog.__annotations__.keys()


def test_a_line_torn_at_any_byte_loses_that_line_alone(tmp_path: Path) -> None:
    data = fill(tmp_path).read_bytes()
    path = tmp_path / "torn.jsonl"
    ends = [at for at, byte in enumerate(data) if byte == ord("\n")]
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        log = assemble(path)
        complete = sum(end <= cut for end in ends)  # a line is complete even without its line feed
        assert len(log["training_iterations"]) == min(max(complete - 1, 0), 3)
        assert log["damaged_lines"] == (cut not in ends and cut - 1 not in ends and cut > 0)
        assert (log["summary"] != {}) == (complete == len(ends))


def test_a_resumed_run_starts_after_a_torn_line(tmp_path: Path) -> None:
    path = fill(tmp_path)
    data = path.read_bytes()
    for cut in range(0, len(data) + 1, 3):
        path.write_bytes(data[:cut])
        before = assemble(path)
        with Journal(tmp_path, NAME, resume_from=2) as log:
            iteration(log, 3)
        after = assemble(path)
        assert iters(after) == [step for step in iters(before) if step <= 2] + [3]
        assert after["damaged_lines"] == before["damaged_lines"]
        assert after["resumes"][0]["iter"] == 2
        assert path.read_bytes().startswith(data[:cut])  # appended, never cut


def test_resume_voids_what_came_later(tmp_path: Path) -> None:
    with Journal(tmp_path, NAME) as log:
        log.write("start", dict(config={"lr": 1}, startup_info={"gpu": "A"}))
        for step in range(10, 60, 10):
            iteration(log, step)
            log.write("eval", dict(iter=step, val_loss=1.0))
            log.write("checkpoint", dict(iter=step, path=f"step-{step}"))
            log.write("message", dict(level="info", text="at", iter=step))
        log.write("message", dict(level="info", text="of no iteration"))
        log.write("summary", {"iterations": 50})
    first = assemble(log.path)
    with Journal(tmp_path, NAME, resume_from=30) as log:
        log.write("start", dict(config={"lr": 2}, startup_info={"gpu": "B"}))
        iteration(log, 40)
    found = assemble(log.path)
    assert iters(found) == [10, 20, 30, 40]
    assert iters(found, "eval_steps") == iters(found, "checkpoints") == [10, 20, 30]
    assert [entry.get("iter") for entry in found["messages"]] == [10, 20, 30, None]
    assert iters(found, "resumes") == [30]
    assert found["summary"] == {}
    assert found["start_time"] == first["start_time"]
    assert (found["config"], found["startup_info"]) == ({"lr": 2}, {"gpu": "B"})
    Journal(tmp_path, NAME, resume_from=10).close()
    assert iters(assemble(log.path)) == [10]
    assert iters(assemble(log.path), "resumes") == [30, 10]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    with Journal(tmp_path, NAME) as log:
        log.write("start", dict(config={"path": Path("a/b"), "betas": (0.9, math.inf)}, startup_info={}))
        log.write(
            "iteration",
            dict(iter=1, loss=math.nan, time_ms=math.inf, gradients={"layer_norms": {"h.0": -math.inf}}),
        )
        log.write("summary", {"values": [math.nan, 1.0], "event": "start"})
        with pytest.raises(TypeError, match="set"):
            log.write("summary", {"a": {1}})
    for line in log.path.read_text().splitlines():
        strict(line)
    with open(log.path, "a") as stream:
        stream.write('{"event":"summary","a":NaN,"b":1e999}\n')
    found = strict(write_json(log.path).read_text())
    assert found["config"] == {"path": "a/b", "betas": [0.9, None]}
    expected = {"iter": 1, "loss": None, "time_ms": None, "gradients": {"layer_norms": {"h.0": None}}}
    assert found["training_iterations"] == [expected]
    assert found["summary"] == {"a": None, "b": None}
    assert found == assemble(log.path)


def test_an_event_is_of_a_known_kind_and_whole(tmp_path: Path) -> None:
    with Journal(tmp_path, NAME) as log:
        with pytest.raises(ValueError, match="event 'iterations'; wanted summary, start, iteration"):
            log.write("iterations", {"iter": 1})
        for event, kind in EVENTS.items():
            for missing in kind.__required_keys__:  # type: ignore[attr-defined]
                fields = dict.fromkeys(kind.__required_keys__ - {missing}, 1)  # type: ignore[attr-defined]
                with pytest.raises(ValueError, match=f"lacks {missing}"):
                    log.write(event, fields)
    assert log.path.read_bytes() == b""


def test_floats_keep_their_bits(tmp_path: Path) -> None:
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0]
    with Journal(tmp_path, NAME) as log:
        log.write("summary", {"values": values})
    found = strict(write_json(log.path).read_text())["summary"]["values"]
    assert [value.hex() for value in found] == [value.hex() for value in values]


def test_unknown_events_and_foreign_lines(tmp_path: Path) -> None:
    path = fill(tmp_path)
    expected = assemble(path)
    with open(path, "ab") as stream:
        stream.write(b'{"event":"hologram","iter":9}\n')
        for line in (
            b"[]",
            b"1",
            b"{}",
            b'{"event":3}',
            b'{"event":"iteration"}',
            b'{"event":"eval","iter":"3"}',
        ):
            stream.write(line + b"\n")
        stream.write(b'{"event":"resume","iter":null}\n\xff\xfe\n' + b"[" * 100_000 + b"\n\n")
    found = assemble(path)
    assert found.pop("ignored_events") == 1  # type: ignore[misc]
    assert found.pop("damaged_lines") == 9  # type: ignore[misc]
    assert found == {key: expected[key] for key in found}  # type: ignore[literal-required]


def test_every_line_is_on_disk_when_the_process_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys; from gptperf.monitor.journal import Journal; from pathlib import Path\n"
        "assert 'torch' not in sys.modules\n"
        f"log = Journal(Path({str(tmp_path)!r}), {NAME!r})\n"
        "for step in range(1, 101): log.write('iteration', dict(iter=step, loss=1.0, time_ms=1.0))\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert iters(assemble(tmp_path / f"{NAME}.jsonl")) == list(range(1, 101))


def test_a_full_disk_costs_events_and_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    log = Journal(tmp_path, NAME, warn=lines.append)
    iteration(log, 1)
    write = os.write

    def half(fd: int, data: bytes) -> int:
        """Writes ten bytes of a line, then fails."""
        if data.startswith((b"{", b"\n")):
            return write(fd, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        for step in (2, 3, 4):
            iteration(log, step)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: half(fd, b"x"))  # not a byte more
        iteration(log, 4)
    assert log.lost == 4
    assert len(lines) == 1
    assert "No space left" in lines[0]
    iteration(log, 5)
    iteration(log, 6)
    log.close()
    found = assemble(log.path)
    assert iters(found) == [1, 5, 6]
    (message,) = found["messages"]
    assert message["text"] == "the disk could not be written: 4 journal events lost"
    assert found["damaged_lines"] == 3
    assert log.lost == 4


def test_a_sync_that_fails_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    log = Journal(tmp_path, NAME)
    monkeypatch.setattr(os, "fsync", fail)
    log.write("checkpoint", dict(iter=1, path="a"))
    log.write("checkpoint", dict(iter=2, path="b"))
    assert log.write_json() is None
    log.close()
    monkeypatch.undo()
    assert iters(assemble(log.path), "checkpoints") == [1, 2]
    assert capsys.readouterr().err.count("Input/output error") == 2  # one for the journal, one for the JSON
    assert os.listdir(tmp_path) == [f"{NAME}.jsonl"]


def test_checkpoint_events_and_close_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(os, "fsync", calls.append)
    log = Journal(tmp_path, NAME)
    iteration(log, 1)
    assert len(calls) == 0
    log.write("checkpoint", dict(iter=1, path="a"))
    assert len(calls) == 1
    log.close()
    log.close()
    assert len(calls) == 2


def test_write_json_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fill(tmp_path)
    target = write_json(path)
    assert target == tmp_path / f"{NAME}.json"
    old = target.read_text()

    def fail(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with open(path, "ab") as stream:
        stream.write(b'{"event":"summary","new":1}\n')
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(DiskError, match="No space left"):
            write_json(path)
    assert target.read_text() == old
    assert sorted(os.listdir(tmp_path)) == [f"{NAME}.json", f"{NAME}.jsonl"]
    assert strict(write_json(path).read_text())["summary"] == {"new": 1}
    with pytest.raises(DataError):
        write_json(tmp_path / "absent.jsonl")


def test_names_never_collide(tmp_path: Path) -> None:
    now = time.struct_time((2025, 1, 3, 14, 30, 22, 4, 3, 0))
    names = []
    for _ in range(11):
        names.append(new_run_name(tmp_path, now))
        Journal(tmp_path, names[-1]).close()
    assert names[:3] == [NAME, f"{NAME}_2", f"{NAME}_3"]
    assert len(set(names)) == 11
    assert find_journal(tmp_path) == tmp_path / f"{NAME}_11.jsonl"  # 11 is after 9
    (tmp_path / "run_20250103_143023.json").write_text("{}")
    later = time.struct_time((2025, 1, 3, 14, 30, 23, 4, 3, 0))
    assert new_run_name(tmp_path, later) == "run_20250103_143023_2"
    (tmp_path / "run_notes.jsonl").write_text("")
    (tmp_path / "zzz.jsonl").write_text("")
    assert find_journal(tmp_path) == tmp_path / f"{NAME}_11.jsonl"
    (tmp_path / "run_20250103_143023.jsonl").write_text("")
    assert find_journal(tmp_path) == tmp_path / "run_20250103_143023.jsonl"
    assert new_run_name(tmp_path, later) == "run_20250103_143023_2"
    assert find_journal(tmp_path / "absent") is None
    assert new_run_name(tmp_path / "absent", now) == NAME


def test_the_newest_run_is_the_newest_whatever_the_clock_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 1_767_225_600.0  # 2026-01-01 00:00:00 UTC
    names = []
    monkeypatch.setattr(time, "time", lambda: pytest.fail("the name of a run comes from UTC alone"))
    # A clock that runs, stands still, and is set back by an hour and by years; time zones around the world.
    for zone, seconds in zip(ZONES * 3, (0, 5, 5, 3000, -600, -599, 86_400, -(10**8), 9), strict=True):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        monkeypatch.setattr(time, "gmtime", functools.partial(GMTIME, clock + seconds))
        names.append(new_run_name(tmp_path))
        with Journal(tmp_path, names[-1]):
            pass
        assert find_journal(tmp_path) == tmp_path / f"{names[-1]}.jsonl"
        (tmp_path / f"{names[-1]}.json").write_text("{}")
        assert newest_log(tmp_path, "json") == tmp_path / f"{names[-1]}.json"
        if len(names) == 5:
            (tmp_path / f"{names[0]}.jsonl").unlink()  # a deleted log does not free a number before the newest one
            (tmp_path / f"{names[0]}.json").unlink()
    assert names[:2] == ["run_20260101_000000", "run_20260101_000005"]
    assert len(set(names)) == len(names)
    monkeypatch.undo()
    time.tzset()


def test_times_of_the_log_do_not_depend_on_the_zone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = time.time()
    for number, zone in enumerate(ZONES):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        with Journal(tmp_path, f"zone{number}", resume_from=3) as journal:
            journal.write("start", {"config": {}, "startup_info": {}})
            journal.write("message", {"level": "info", "text": "x"})
        log = assemble(journal.path)
        for text in (log["start_time"], log["messages"][0]["time"], log["resumes"][0]["time"]):
            assert before - 1 <= datetime.datetime.fromisoformat(text).timestamp() <= time.time() + 1
        assert 0 <= log["messages"][0]["elapsed_s"] < 60
    monkeypatch.undo()
    time.tzset()


def test_a_new_run_never_writes_into_an_old_journal(tmp_path: Path) -> None:
    fill(tmp_path)
    with pytest.raises(ConfigError, match="exists already"):
        Journal(tmp_path, NAME)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a\0b", "", ".hidden", "-x", "a/b", "x" * 65, "caf\u00e9", "a\n"])
def test_run_names_stay_in_the_directory(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="run name"):
        Journal(tmp_path, name)
    assert os.listdir(tmp_path) == []


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot be opened"):
        Journal(tmp_path / "file", NAME)
    (tmp_path / f"{NAME}.jsonl").symlink_to(tmp_path / "file")
    with pytest.raises(DiskError, match="cannot be opened"):
        Journal(tmp_path, NAME, resume_from=1)
