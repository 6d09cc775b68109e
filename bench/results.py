"""The results of the bench: a folder with a JSON file for each cell, which says how it was measured. No torch here."""

import datetime
import hashlib
import json
import math
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gptperf.errors import ConfigError
from gptperf.files import replace_text

__all__ = ["ROOT", "SCHEMA", "Record", "cell_path", "default_folder", "guarded", "identity", "load_folder", "now"]
__all__ += ["Records", "done", "read", "source_state", "write"]

Record = dict[str, Any]
Records = Mapping[str, Record]
SCHEMA = 1
ROOT = Path(__file__).parent.parent
_MEASURED = ("gptperf/**/*.py", "kernels/*.py", "configs/*.toml", "bench/cells.py", "bench/measure/*.py")
"""Patterns of the source files that can change a figure."""
_NEEDED = ("cell", "status", "date", "environment", "results", "schema")


def now() -> str:
    """Returns the current time in UTC, as ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def cell_path(folder: Path, cell: str) -> Path:
    """Returns the path of the file of a cell."""
    return folder / f"{cell.replace('/', '__')}.json"


def _finite(value: Any) -> Any:
    """Replaces numbers that are not finite with None, because JSON has no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def write(folder: Path, record: Record) -> Path:
    """Writes the file of a cell, completely or not at all, and returns its path.

    Raises:
        DiskError: The file cannot be written.
    """
    path = cell_path(folder, record["cell"])
    replace_text(path, json.dumps(_finite(record), indent=1, allow_nan=False) + "\n")
    return path


def done(records: Records, kind: str) -> dict[str, Record]:
    """Returns the records of the cells of one kind that were measured."""
    return {c: r for c, r in records.items() if c.partition("/")[0] == kind and r["status"] == "done"}


def read(path: Path) -> Record:
    """Reads the file of a cell.

    Raises:
        ConfigError: The file is not a result of the bench, or has another version.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: not a result of the bench: {error}") from error
    missing = [key for key in _NEEDED if not isinstance(record, dict) or key not in record]
    if missing:
        raise ConfigError(f"{path}: not a result of the bench: {', '.join(missing)} not there")
    if record["schema"] != SCHEMA:
        raise ConfigError(f"{path}: found schema {record['schema']!r}, wanted {SCHEMA}; measure it again")
    return dict(record)


def load_folder(folder: Path) -> dict[str, Record]:
    """Returns cell -> result for all results of a folder, in the order of their names.

    Raises:
        ConfigError: There is no result, or a file is not a result.
    """
    records = [read(path) for path in sorted(folder.glob("*.json"))]
    if not records:
        raise ConfigError(f"{folder}: found no result of the bench, wanted a folder that `python -m bench` wrote")
    return {record["cell"]: record for record in records}


def identity(record: Record) -> tuple[Any, ...]:
    """Returns the facts that must be equal for a result to be valid: device, driver, versions, sources and form."""
    made_by = record["environment"]
    source = made_by.get("source", {})
    versions = tuple(sorted((name, str(version)) for name, version in made_by.get("versions", {}).items()))
    return made_by.get("device"), made_by.get("driver"), versions, source.get("digest"), bool(record.get("quick"))


def _sources(root: Path) -> Iterator[Path]:
    for pattern in _MEASURED:
        yield from sorted(root.glob(pattern))


def source_state(root: Path = ROOT) -> dict[str, Any]:
    """Returns the commit, whether tracked files differ from it, and a digest of the files that can change a figure.

    Returns:
        commit and dirty (None if git does not know), digest.
    """
    digest = hashlib.sha256()
    for path in _sources(root):
        digest.update(f"{path.relative_to(root)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    commit, changed = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain")
    return {
        "commit": commit,
        "dirty": None if commit is None or changed is None else bool(changed),
        "digest": digest.hexdigest()[:16],
    }


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def default_folder(environment: Mapping[str, Any], root: Path = ROOT) -> Path:
    """Returns out/bench/DEVICE-COMMIT, so that the results of other commits stay for comparison."""
    source = environment["source"]
    device = re.sub(r"[^a-z0-9]+", "_", str(environment["device"]).lower()).strip("_")
    return root / "out" / "bench" / f"{device}-{(source['commit'] or source['digest'])[:9]}"


def guarded(row: Record, work: Callable[[], Any]) -> Any:
    """Runs `work` and returns its result; an error is stored as the `error` of the row, and None is returned."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - rivals raise errors of any class, and an error is a result
        text = " ".join(str(error).split())
        row["error"] = f"{type(error).__name__}: {text[:300]}"
        return None
