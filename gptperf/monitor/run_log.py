"""A run's log as a report reads it: found, loaded, and asked for values that may be missing or of a wrong kind."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from gptperf.errors import DataError
from gptperf.monitor.events import RunLog
from gptperf.monitor.journal import assemble, find_journal

__all__ = ["entries_of", "find_log", "gaps", "load", "mapping", "number", "series", "value_at"]

_LISTS = ("training_iterations", "eval_steps", "checkpoints", "profiles", "messages", "resumes")
_TABLES = ("config", "startup_info", "summary")
_MOST_ITER = 2**53
_MOST = 1e30

Entry = Mapping[str, Any]


def find_log(run: Path) -> Path:
    """The journal or, without one, the JSON file of a run that is named by its folder or a file of it.

    Raises:
        DataError: there is none.
    """
    if os.path.isdir(run):
        found = find_journal(run) or max(run.glob("run_*.json"), default=None)
        if found is None:
            raise DataError(f"{run}: found no run_*.jsonl or run_*.json, wanted the out_dir of a run")
        return found
    if not os.path.isfile(run):
        raise DataError(f"{run}: not there, wanted a run's folder, run_*.jsonl or run_*.json")
    if run.suffix not in (".jsonl", ".json"):
        raise DataError(f"{run}: wanted a run's folder, run_*.jsonl or run_*.json")
    return run


def load(path: Path) -> RunLog:
    """Read a log; entries of no iteration are left out and counted as damaged lines.

    Raises:
        DataError: It cannot be read, or is none.
    """
    raw: dict[str, Any] = dict(assemble(path)) if path.suffix == ".jsonl" else _read(path)
    log: dict[str, Any] = {name: dict(mapping(raw.get(name))) for name in _TABLES}
    damaged = number(raw.get("damaged_lines")) or 0
    for name in _LISTS:
        given = raw.get(name) if isinstance(raw.get(name), list) else []
        log[name] = [entry for entry in given or [] if _is_entry(entry, name)]
        damaged += len(given or []) - len(log[name])
        if name in ("training_iterations", "eval_steps"):
            log[name].sort(key=lambda entry: entry["iter"])
    log |= {"schema_version": raw.get("schema_version", 0), "damaged_lines": int(damaged)}
    log |= {"run_name": str(raw.get("run_name") or path.stem), "start_time": str(raw.get("start_time") or "")}
    log["ignored_events"] = int(number(raw.get("ignored_events")) or 0)
    return cast(RunLog, log)


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_bytes(), parse_constant=lambda _: None)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("training_iterations"), list):
        raise DataError(f"{path} is not a run's log: found no training_iterations")
    return raw


def _is_entry(entry: Any, name: str) -> bool:
    if not isinstance(entry, dict):
        return False
    iteration = entry.get("iter", 0 if name == "messages" else None)
    return type(iteration) is int and 0 <= iteration < _MOST_ITER


def mapping(value: Any) -> Mapping[str, Any]:
    """The value where it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def number(value: Any) -> float | None:
    """The value where it is a number that can be drawn, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < _MOST and math.isfinite(value) else None


def value_at(entry: Any, *path: str) -> Any:
    """What lies under the keys, or None."""
    for key in path:
        entry = mapping(entry).get(key)
    return entry


def series(entries: Iterable[Entry], *path: str, positive: bool = False) -> tuple[list[int], list[float]]:
    """Iterations and numbers of the entries that have one."""
    pairs = [(entry["iter"], number(value_at(entry, *path))) for entry in entries]
    kept = [(x, y) for x, y in pairs if y is not None and (y > 0 or not positive)]
    return [x for x, _ in kept], [y for _, y in kept]


def entries_of(log: RunLog, path: str) -> list[str]:
    """Keys of a mapping under `gradients`, in the order in which they came."""
    found: dict[str, None] = {}
    for entry in log["training_iterations"]:
        found.update(dict.fromkeys(map(str, mapping(value_at(entry, "gradients", path)))))
    return list(found)


def gaps(log: RunLog) -> list[int]:
    """Iterations whose loss was not a number."""
    return [entry["iter"] for entry in log["training_iterations"] if number(entry.get("loss")) is None]
