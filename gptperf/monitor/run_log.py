"""Reads run logs: finds the journal or JSON file of a run, and loads as much of it as is usable.

A log may be torn, damaged or of another version. The loaded log has the types of `RunLog` down to its entries. Values
inside an entry may still be missing or of a wrong type; `finite`, `mapping`, `value_at` and `series` check them.
`gptperf.monitor.runs` turns the same logs into curves over tokens. This module does not import torch.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from gptperf.errors import DataError
from gptperf.monitor.events import RunLog
from gptperf.monitor.journal import assemble, find_journal, newest_log

__all__ = ["entries_of", "find_log", "finite", "gaps", "load", "mapping", "series", "value_at"]

_LISTS = ("training_iterations", "eval_steps", "checkpoints", "profiles", "messages", "resumes")
_TABLES = ("config", "startup_info", "summary")
_MOST_ITER = 2**53
_MOST = 1e30
"""Numbers beyond this can neither be drawn nor added up."""

Entry = Mapping[str, Any]


def find_log(run: Path) -> Path:
    """Returns the journal of a run or, without one, its JSON file.

    Args:
        run: Folder of a run, of which the newest log is returned, or a log itself.

    Raises:
        DataError: There is no log.
    """
    if os.path.isdir(run):
        try:
            found = find_journal(run) or newest_log(run, "json")
        except OSError as error:
            raise DataError(f"{run}: cannot be read: {error.strerror}") from error
        if found is None:
            raise DataError(f"{run}: found no run_*.jsonl or run_*.json, wanted the out_dir of a run")
        return found
    if not os.path.isfile(run):
        raise DataError(f"{run}: found no such file, wanted the folder of a run, run_*.jsonl or run_*.json")
    if run.suffix not in (".jsonl", ".json"):
        raise DataError(f"{run}: found another file, wanted the folder of a run, run_*.jsonl or run_*.json")
    return run


def load(path: Path) -> RunLog:
    """Reads a log. Entries without a valid iteration are left out and counted as damaged lines.

    Raises:
        DataError: The file cannot be read, or is not a run's log.
    """
    raw: dict[str, Any] = dict(assemble(path)) if path.suffix == ".jsonl" else _read_json(path)
    log: dict[str, Any] = {name: dict(mapping(raw.get(name))) for name in _TABLES}
    damaged = finite(raw.get("damaged_lines")) or 0
    for name in _LISTS:
        given = raw.get(name) if isinstance(raw.get(name), list) else []
        log[name] = [entry for entry in given or [] if _is_entry(entry, name)]
        damaged += len(given or []) - len(log[name])
        if name in ("training_iterations", "eval_steps"):
            log[name].sort(key=lambda entry: entry["iter"])
    log |= {"schema_version": raw.get("schema_version", 0), "damaged_lines": int(damaged)}
    log |= {"run_name": str(raw.get("run_name") or path.stem), "start_time": str(raw.get("start_time") or "")}
    log["ignored_events"] = int(finite(raw.get("ignored_events")) or 0)
    return cast(RunLog, log)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_bytes(), parse_constant=lambda _: None)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: not valid JSON: {error}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("training_iterations"), list):
        raise DataError(f"{path}: not the log of a run: found no training_iterations")
    return raw


def _is_entry(entry: Any, name: str) -> bool:
    if not isinstance(entry, dict):
        return False
    iteration = entry.get("iter", 0 if name == "messages" else None)
    return type(iteration) is int and 0 <= iteration < _MOST_ITER


def mapping(value: Any) -> Mapping[str, Any]:
    """Returns the value if it is a mapping, else an empty mapping."""
    return value if isinstance(value, Mapping) else {}


def finite(value: Any) -> float | None:
    """Returns the value if it is a number that can be drawn and added up, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < _MOST else None  # false for NaN too


def value_at(entry: Any, *path: str) -> Any:
    """Returns the value under nested keys, or None."""
    for key in path:
        entry = mapping(entry).get(key)
    return entry


def series(entries: Iterable[Entry], *path: str, positive: bool = False) -> tuple[list[int], list[float]]:
    """Returns the iterations and numbers of all entries that have a number under the keys.

    With `positive`, numbers that are not above zero are left out.
    """
    pairs = [(entry["iter"], finite(value_at(entry, *path))) for entry in entries]
    kept = [(x, y) for x, y in pairs if y is not None and (y > 0 or not positive)]
    return [x for x, _ in kept], [y for _, y in kept]


def entries_of(log: RunLog, path: str) -> list[str]:
    """Returns all keys of a mapping under `gradients`, in the order of their first entry."""
    found: dict[str, None] = {}
    for entry in log["training_iterations"]:
        found.update(dict.fromkeys(map(str, mapping(value_at(entry, "gradients", path)))))
    return list(found)


def gaps(log: RunLog) -> list[int]:
    """Returns the iterations whose loss is not a finite number."""
    return [entry["iter"] for entry in log["training_iterations"] if finite(entry.get("loss")) is None]
