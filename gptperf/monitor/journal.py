"""The journal of a run, `run_YYYYmmdd_HHMMSS.jsonl` in UTC, and the JSON file that is assembled from it.

Each line is an event, and lines are only appended, so a killed run loses at most its last line. `Journal` writes and
`assemble` reads; `gptperf.monitor.events` declares the fields. Numbers that are not finite become null, because JSON
has no NaN.
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from gptperf.errors import ConfigError, DataError, DiskError
from gptperf.files import replace_text
from gptperf.formats import counted
from gptperf.monitor.events import EVENTS, SCHEMA_VERSION, Resume, RunLog

__all__ = ["Journal", "assemble", "find_journal", "new_run_name", "newest_log", "write_json"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_RUN = re.compile(r"run_(\d{8}_\d{6})(?:_(\d{1,6}))?\.(jsonl?)", re.ASCII)
_WITH_ITER = ("iteration", "eval", "checkpoint", "profile", "resume")


class Journal:
    """Appends events to `<out_dir>/<run_name>.jsonl`.

    A disk that fails does not stop training. The event is lost and counted, and the user gets one warning through
    `warn`. As soon as the journal can be written again, it records how many events are missing.

    Args:
        out_dir: directory of the run; created if it does not exist.
        run_name: name from `new_run_name`, or for a resumed run the stem of `find_journal`'s file.
        resume_from: iteration of the loaded checkpoint. The journal of the run is continued, and its entries of later
            iterations no longer count. None starts a new journal.
        warn: called with one line when an event is lost; by default the line goes to stderr.

    Raises:
        ConfigError: the name is not a file name, or the journal of a new run exists already.
        DiskError: the journal cannot be opened.
    """

    def __init__(
        self,
        out_dir: Path,
        run_name: str,
        *,
        resume_from: int | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        if not _NAME.fullmatch(run_name):
            raise ConfigError(f"run name: found {run_name!r}, wanted at most 64 letters, digits, '.', '_' and '-'")
        self.run_name = run_name
        self.path = Path(out_dir) / f"{run_name}.jsonl"
        self.lost = 0
        self._opened = time.monotonic()
        self._unreported = 0
        self._warned = False
        self._warn = warn or (lambda text: print(text, file=sys.stderr))
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        flags |= os.O_EXCL if resume_from is None else 0
        try:
            Path(out_dir).mkdir(parents=True, exist_ok=True)
            self._fd: int | None = os.open(self.path, flags, 0o666)
        except OSError as error:
            if isinstance(error, FileExistsError) and os.path.lexists(self.path):
                raise ConfigError(f"{self.path} exists already; wanted a new run name") from None
            raise DiskError(f"{self.path} cannot be opened: {error}") from error
        # If the file ends with a torn line, a newline is written before the next event, so that the reader drops only
        # the torn line.
        size = os.fstat(self._fd).st_size
        self._torn = size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"
        if resume_from is not None:
            self.write("resume", Resume(iter=resume_from, time=_now()))

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, event: str, fields: Mapping[str, Any]) -> None:
        """Appends one event. The event `checkpoint` also syncs the journal, because a checkpoint is durable itself.

        Args:
            event: one of `EVENTS`, or "summary", which takes any fields.
            fields: the fields of the event's class, and any others. The time of a start or a message is added here.
                After a resume the configuration of the newer start counts, with the time of the first one.

        Raises:
            ValueError: the event is unknown or lacks a field.
            TypeError: JSON has no type for a value.
        """
        if event != "summary":
            if event not in EVENTS:
                raise ValueError(f"event {event!r}; wanted summary, {', '.join(EVENTS)}")
            missing = EVENTS[event].__required_keys__ - fields.keys()  # type: ignore[attr-defined]
            if missing:
                raise ValueError(f"event {event!r} lacks {', '.join(sorted(missing))}; it has {', '.join(fields)}")
        if event == "start":
            fields = {"run_name": self.run_name, "start_time": _now(), **fields}
        elif event == "message":
            fields = {**fields, "time": _now(), "elapsed_s": round(time.monotonic() - self._opened, 3)}
        self._append(event, fields)
        if event == "checkpoint":
            self._sync()

    def write_json(self) -> Path | None:
        """Assembles `<run_name>.json` beside the journal, and returns its path; on failure warns and returns None."""
        try:
            return write_json(self.path)
        except (DiskError, DataError) as error:
            self._warn(f"{error}; {self.path.name} has all events")
            return None

    def close(self) -> None:
        """Syncs and closes the file. May be called twice."""
        if self._fd is not None:
            self._sync()
            os.close(self._fd)
            self._fd = None

    def reopen(self) -> None:
        """Opens the file again if it was closed, to record the error that ends the process."""
        if self._fd is None:
            self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)

    def _append(self, event: str, fields: Mapping[str, Any]) -> None:
        assert self._fd is not None, "the journal is closed"
        line = _line(event, fields)
        if self._unreported:
            text = f"the disk could not be written: {counted(self._unreported, 'journal event')} lost"
            line = _line("message", {"level": "warning", "text": text, "time": _now()}) + line
        if self._torn:
            line = b"\n" + line
        done = 0
        try:
            while done < len(line):
                done += os.write(self._fd, line[done:])
        except OSError as error:
            self._torn = self._torn if done == 0 else line[done - 1 : done] != b"\n"
            self._warn_once(error)
            self.lost += 1
            self._unreported += 1
        else:
            self._torn, self._unreported = False, 0

    def _sync(self) -> None:
        assert self._fd is not None
        try:
            os.fsync(self._fd)
        except OSError as error:
            self._warn_once(error)

    def _warn_once(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            self._warn(f"journal: {self.path} cannot be written: {error}; the run continues without it")


def new_run_name(out_dir: Path, now: time.struct_time | None = None) -> str:
    """Returns `run_YYYYmmdd_HHMMSS`, the time in UTC, with _2, _3, ... if a log of that time exists.

    The name is later than that of every run in the folder. If the clock is behind the newest one, because it was set
    back or because an older version named runs in local time, the new run gets the time of that one and the next
    number.
    """
    stem, count = time.strftime("%Y%m%d_%H%M%S", now or time.gmtime()), 1
    newest = max(_runs(out_dir), default=None)
    if newest is not None and newest[0] >= stem:
        stem, count = newest[0], newest[1] + 1
    return f"run_{stem}" + (f"_{count}" if count > 1 else "")


def find_journal(out_dir: Path) -> Path | None:
    """Returns the journal of the run that started last, by its name, or None if there is no journal."""
    return newest_log(out_dir, "jsonl")


def newest_log(out_dir: Path, suffix: str) -> Path | None:
    """Returns the log, "jsonl" or "json", of the run that started last, by its name, or None if there is none."""
    newest = max((run for run in _runs(out_dir) if run[2] == suffix), default=None)
    return Path(out_dir) / newest[3] if newest else None


def _runs(out_dir: Path) -> list[tuple[str, int, str, str]]:
    """Returns time, number, suffix and file name of every log in a folder, which sort in the order of the starts."""
    try:
        names = os.listdir(out_dir)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [(match[1], int(match[2] or 1), match[3], match[0]) for match in map(_RUN.fullmatch, names) if match]


def assemble(jsonl_path: Path) -> RunLog:
    """Builds the log of a run from its journal, which need not be complete.

    Raises:
        DataError: the journal cannot be read.
    """
    path = Path(jsonl_path)
    log = RunLog(
        schema_version=SCHEMA_VERSION,
        run_name=path.stem,
        start_time="",
        config={},
        startup_info={},
        training_iterations=[],
        eval_steps=[],
        checkpoints=[],
        profiles=[],
        messages=[],
        resumes=[],
        summary={},
        damaged_lines=0,
        ignored_events=0,
    )
    try:
        with open(path, "rb") as stream:
            for line in stream:
                _add(log, line)
    except OSError as error:
        raise DataError(f"journal {path} cannot be read: {error}") from error
    return log


def write_json(jsonl_path: Path) -> Path:
    """Assembles a journal and writes the result beside it as `<run_name>.json`, whole or not at all.

    Raises:
        DataError: the journal cannot be read.
        DiskError: the file cannot be written.
    """
    path = Path(jsonl_path).with_suffix(".json")
    replace_text(path, json.dumps(assemble(jsonl_path), indent=2, allow_nan=False) + "\n")
    return path


def _add(log: RunLog, line: bytes) -> None:
    """Adds one line of the journal to the log."""
    entry = _parse(line)
    if entry is None:
        log["damaged_lines"] += bool(line.strip())
        return
    event = entry.pop("event")
    if event == "start":
        log["start_time"] = log["start_time"] or str(entry.get("start_time", ""))
        log["config"], log["startup_info"] = _table(entry, "config"), _table(entry, "startup_info")
    elif event == "summary":
        log["summary"] = entry
    elif event in _WITH_ITER or event == "message":
        if event == "resume":
            _void(log, entry["iter"])
        _list(log, event).append(entry)
    else:
        log["ignored_events"] += 1


def _list(log: RunLog, event: str) -> list[dict[str, Any]]:
    """Returns the list of a log that holds the entries of an event."""
    return {
        "iteration": log["training_iterations"],
        "eval": log["eval_steps"],
        "checkpoint": log["checkpoints"],
        "profile": log["profiles"],
        "message": log["messages"],
        "resume": log["resumes"],
    }[event]


def _void(log: RunLog, last: int) -> None:
    """Drops the entries after iteration `last`, because the run was resumed from there."""
    for event in ("iteration", "eval", "checkpoint", "message"):
        entries = _list(log, event)
        entries[:] = [entry for entry in entries if entry.get("iter", last) <= last]
    log["summary"] = {}


def _table(entry: dict[str, Any], key: str) -> dict[str, Any]:
    value = entry.get(key)
    return value if isinstance(value, dict) else {}


def _parse(line: bytes) -> dict[str, Any] | None:
    """Returns the event of a line, or None if the line is torn or is not one that `Journal` writes."""
    try:
        entry = json.loads(line, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get("event"), str):
        return None
    needs_iter = entry["event"] in _WITH_ITER or (entry["event"] == "message" and "iter" in entry)
    return None if needs_iter and type(entry.get("iter")) is not int else entry


def _finite(text: str) -> float | None:
    return None if not math.isfinite(value := float(text)) else value


def _line(event: str, fields: Mapping[str, Any]) -> bytes:
    record = {"event": event, **{key: _plain(value) for key, value in fields.items() if key != "event"}}
    return json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _plain(value: Any) -> Any:
    """Converts a value to the types of strict JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError(f"the journal cannot store a {type(value).__name__}: {value!r:.80}")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
