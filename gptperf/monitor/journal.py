"""The journal of a run, `run_YYYYmmdd_HHMMSS.jsonl`, and the one JSON file that is assembled from it.

One event a line, only ever appended to: a killed run loses at most its last line. `Journal` writes,
`assemble` reads; `gptperf.monitor.events` has the fields. What is not finite becomes null: JSON has no NaN.
"""

import json
import math
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from gptperf.errors import ConfigError, DataError, DiskError
from gptperf.monitor.events import EVENTS, SCHEMA_VERSION, Resume, RunLog

__all__ = ["Journal", "assemble", "find_journal", "new_run_name", "write_json"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_RUN = re.compile(r"run_(\d{8})_(\d{6})(?:_(\d{1,6}))?\.jsonl", re.ASCII)
_WITH_ITER = ("iteration", "eval", "checkpoint", "profile", "resume")


class Journal:
    """Appends events to `<out_dir>/<run_name>.jsonl`.

    A disk that fails while training does not stop it: the event is lost and counted, the user is told once
    through `warn`, and the journal says how many are missing as soon as it can be written again.

    Args:
        out_dir: Directory of the run; made if absent.
        run_name: From `new_run_name`, or for a resumed run the stem of `find_journal`'s file.
        resume_from: Iteration of the loaded checkpoint: go on with the run's journal and void what it says of
            later ones. None starts a new journal.
        warn: Gets one line when an event is lost; stderr without it.

    Raises:
        ConfigError: The name is no file name, or a new run's journal is there already.
        DiskError: The journal cannot be opened.
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
            raise ConfigError(f"run name {run_name!r}; wanted letters, digits, '.', '_', '-', at most 64")
        self.run_name = run_name
        self.path = Path(out_dir) / f"{run_name}.jsonl"
        self.lost = 0
        self._untold = 0
        self._alarmed = False
        self._warn = warn or (lambda text: print(text, file=sys.stderr))
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        flags |= os.O_EXCL if resume_from is None else 0
        try:
            Path(out_dir).mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd: int | None = os.open(self.path, flags, 0o644)
        except OSError as error:
            if isinstance(error, FileExistsError) and os.path.lexists(self.path):
                raise ConfigError(f"{self.path} is there already; wanted a new run name") from None
            raise DiskError(f"{self.path} cannot be opened: {error}") from error
        # After a torn line the next one starts on its own, and the reader drops the torn one alone.
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
        """Append one event; a checkpoint also makes the journal durable, as it is itself.

        Args:
            event: One of `EVENTS`, or "summary" with whatever fields.
            fields: Those of the event's class, and others. A start or message gets its time here; after a
                resume the newer start's configuration stands, with the first one's time.

        Raises:
            ValueError: The event is unknown or lacks a field.
            TypeError: A value is not of a kind that JSON has.
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
            fields = {**fields, "time": _now()}
        self._append(event, fields)
        if event == "checkpoint":
            self._sync()

    def write_json(self) -> Path | None:
        """Assemble `<run_name>.json` beside the journal; None, with a warning, where that fails."""
        try:
            return write_json(self.path)
        except (DiskError, DataError) as error:
            self._warn(f"{error}; {self.path.name} holds everything")
            return None

    def close(self) -> None:
        """Sync and close; closing twice is allowed."""
        if self._fd is not None:
            self._sync()
            os.close(self._fd)
            self._fd = None

    def reopen(self) -> None:
        """Go on after `close`, with what ends the process."""
        if self._fd is None:
            self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)

    def _append(self, event: str, fields: Mapping[str, Any]) -> None:
        assert self._fd is not None, "the journal is closed"
        line = _line(event, fields)
        if self._untold:
            text = f"{self._untold} journal events were lost: the disk refused them"
            line = _line("message", {"level": "warning", "text": text, "time": _now()}) + line
        if self._torn:
            line = b"\n" + line
        done = 0
        try:
            while done < len(line):
                done += os.write(self._fd, line[done:])
        except OSError as error:
            self._torn = self._torn if done == 0 else line[done - 1 : done] != b"\n"
            self._alarm(error)
            self.lost += 1
            self._untold += 1
        else:
            self._torn, self._untold = False, 0

    def _sync(self) -> None:
        assert self._fd is not None
        try:
            os.fsync(self._fd)
        except OSError as error:
            self._alarm(error)

    def _alarm(self, error: OSError) -> None:
        if not self._alarmed:
            self._alarmed = True
            self._warn(f"journal: {self.path} cannot be written: {error}; the run goes on without it")


def new_run_name(out_dir: Path, now: time.struct_time | None = None) -> str:
    """`run_YYYYmmdd_HHMMSS` of local time, with _2, _3, ... where that is taken."""
    stem = time.strftime("run_%Y%m%d_%H%M%S", now or time.localtime())
    name, count = stem, 1
    while any(os.path.lexists(Path(out_dir) / f"{name}{end}") for end in (".jsonl", ".json")):
        count += 1
        name = f"{stem}_{count}"
    return name


def find_journal(out_dir: Path) -> Path | None:
    """The journal of the run that started last, by its name; None where there is none."""
    try:
        names = os.listdir(out_dir)
    except (FileNotFoundError, NotADirectoryError):
        return None
    runs = [match for match in map(_RUN.fullmatch, names) if match]
    newest = max(runs, key=lambda match: (match[1], match[2], int(match[3] or 1)), default=None)
    return Path(out_dir) / newest[0] if newest else None


def assemble(jsonl_path: Path) -> RunLog:
    """Build the run's log out of its journal, as far as that was written.

    Raises:
        DataError: The journal cannot be read.
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
    """Write `<run_name>.json` beside the journal; a reader sees the old file or the new one, never a part.

    Raises:
        DataError: The journal cannot be read.
        DiskError: The file cannot be written.
    """
    path = Path(jsonl_path).with_suffix(".json")
    data = json.dumps(assemble(jsonl_path), indent=2, allow_nan=False).encode() + b"\n"
    tmp = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        try:
            with open(tmp, "xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(tmp, path)
        finally:
            tmp.unlink(missing_ok=True)
    except OSError as error:
        raise DiskError(f"{path} cannot be written: {error}") from error
    return path


def _add(log: RunLog, line: bytes) -> None:
    """Add one line of the journal to the log."""
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
    return {
        "iteration": log["training_iterations"],
        "eval": log["eval_steps"],
        "checkpoint": log["checkpoints"],
        "profile": log["profiles"],
        "message": log["messages"],
        "resume": log["resumes"],
    }[event]


def _void(log: RunLog, last: int) -> None:
    """Drop what was logged after iteration `last` of a run that went on from there."""
    for event in ("iteration", "eval", "checkpoint", "message"):
        entries = _list(log, event)
        entries[:] = [entry for entry in entries if entry.get("iter", last) <= last]
    log["summary"] = {}


def _table(entry: dict[str, Any], key: str) -> dict[str, Any]:
    value = entry.get(key)
    return value if isinstance(value, dict) else {}


def _parse(line: bytes) -> dict[str, Any] | None:
    """The event of a line, or None where it is torn or not one that `Journal` writes."""
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
    """A value as strict JSON has it."""
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
    raise TypeError(f"the journal holds no {type(value).__name__}: {value!r:.80}")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S")
