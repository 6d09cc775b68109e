"""What makes a directory a checkpoint: name, sealed manifest, files of the right size and hash. No torch."""

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gptperf.errors import CheckpointError, NonFiniteError
from gptperf.files import FileRecord, open_regular

__all__ = [
    "MANIFEST",
    "SCHEMA",
    "SET_ASIDE",
    "STATE",
    "STATE_LIMIT",
    "STEM",
    "CheckpointInfo",
    "Manifest",
    "NewerSchemaError",
    "best_of",
    "check_files",
    "check_hash",
    "has_all_bytes",
    "list_checkpoints",
    "parse_json",
    "read_file",
    "read_manifest",
    "seal",
    "state_text",
]

SCHEMA = 1
"""Number of the layout that is written; a checkpoint with a greater one is refused.

Every later layout keeps `schema` and `sha256` of the manifest as they are, which tells a newer one from a
damaged one.
"""

MANIFEST = "MANIFEST.json"
STATE = "state.json"
STATE_LIMIT = 1 << 26
MANIFEST_LIMIT = 1 << 22
READ_CHUNK = 1 << 24
STEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)
SET_ASIDE = re.compile(r"\.old-(\d{8,18})-[0-9a-f]{8}", re.ASCII)
_STEP = re.compile(r"step-(\d{8,18})", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """A checkpoint on disk, not yet verified; `metric` is None where it was not given or cannot be read."""

    path: Path
    step: int
    metric: float | None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `MANIFEST.json` says."""

    step: int
    metric: float | None
    files: tuple[FileRecord, ...]


class NewerSchemaError(CheckpointError):
    """An undamaged checkpoint of a later gptperf: going back to an older one would fork the run."""


def seal(step: int, metric: float | None, files: Iterable[FileRecord], schema: int = SCHEMA) -> bytes:
    """Text of a manifest; it holds the hash of its own other fields."""
    body = {"schema": schema, "step": step, "metric": metric, "files": [asdict(file) for file in files]}
    return _canonical({**body, "sha256": hashlib.sha256(_canonical(body)).hexdigest()})


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of the checkpoint at `path`.

    Raises:
        NewerSchemaError: A later gptperf wrote it.
        CheckpointError: There is none, or it is damaged.
    """
    where = path / MANIFEST
    if path.is_symlink():
        raise CheckpointError(f"{path} is a symbolic link; wanted the checkpoint's own directory")
    raw = read_file(where, MANIFEST_LIMIT)
    found = parse_json(raw, where)
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} is damaged: it holds a {type(found).__name__}; wanted an object")
    sealed = _is_sealed(found, raw)
    schema = found.get("schema")
    if type(schema) is int and schema > SCHEMA:
        text = f"{where} has schema {schema}, this gptperf reads up to {SCHEMA}: it needs a newer gptperf"
        raise (NewerSchemaError(text) if sealed else CheckpointError(f"{text}, or it is damaged: its seal is broken"))
    if not sealed:
        raise CheckpointError(f"{where} is damaged: SHA-256 of its content differs from the one it names")
    manifest = _parse(found, where)
    named = _STEP.fullmatch(path.name)
    if named and int(named[1]) != manifest.step:
        raise CheckpointError(f"{where} is of step {manifest.step}; wanted {int(named[1])}, as the directory says")
    return manifest


def check_files(path: Path, manifest: Manifest) -> None:
    """See that the directory holds exactly the manifest's files, regular ones, of the right size.

    Raises:
        CheckpointError: It does not; names the file, expected and actual bytes.
    """
    wanted = {file.name: file.bytes for file in manifest.files}
    try:
        present = set(os.listdir(path)) - {MANIFEST}
        for name in sorted(wanted.keys() - present):
            raise CheckpointError(f"{path / name} is missing; wanted {wanted[name]} bytes")
        for name in sorted(present - wanted.keys()):
            raise CheckpointError(f"{path / name} is not in {MANIFEST}; wanted {', '.join(sorted(wanted))} alone")
        for name, size in wanted.items():
            status = os.lstat(path / name)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path / name} is a link or no regular file")
            if status.st_size != size:
                raise CheckpointError(f"{path / name} has {status.st_size} bytes; wanted {size}")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def check_hash(path: Path, file: FileRecord) -> None:
    """Compare a file with its SHA-256.

    Raises:
        CheckpointError: They differ.
    """
    digest = hashlib.sha256()
    buffer = bytearray(min(READ_CHUNK, max(file.bytes, 1)))
    size = 0
    try:
        with open(open_regular(path / file.name), "rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
                size += count
    except OSError as error:
        raise CheckpointError(f"{path / file.name} cannot be read: {error}") from error
    if size != file.bytes or digest.hexdigest() != file.sha256:
        raise CheckpointError(
            f"{path / file.name} is damaged: {size} bytes with SHA-256 {digest.hexdigest()}; "
            f"wanted {file.bytes} bytes with {file.sha256}"
        )


def read_file(path: Path, limit: int) -> bytes:
    """Content of a regular file of at most `limit` bytes.

    Raises:
        CheckpointError: It is longer, or cannot be read.
    """
    try:
        with open(open_regular(path), "rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if len(data) > limit:
        raise CheckpointError(f"{path} has more than {limit} bytes, the most that gptperf writes")
    return data


def parse_json(data: bytes, path: Path) -> Any:
    """Parse strict JSON: no NaN, no infinity.

    Raises:
        CheckpointError: It is not that.
    """
    try:
        return json.loads(data, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {str(error)[:200]}") from error


def list_checkpoints(directory: Path, *, strict: bool = False) -> list[CheckpointInfo]:
    """Checkpoints that have a manifest, oldest first, with one that a save set aside until it is replaced.

    Raises:
        CheckpointError: The directory cannot be read, or, if `strict`, it cannot be told whether there is a manifest.
    """
    try:
        names = sorted(os.listdir(directory), reverse=True)  # "step-" before ".old-"
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error}") from error
    found: dict[int, CheckpointInfo] = {}
    for name in names:
        match = _STEP.fullmatch(name) or SET_ASIDE.fullmatch(name)
        path = directory / name
        if match and int(match[1]) not in found and not path.is_symlink() and _is_there(path / MANIFEST, strict):
            try:
                metric = read_manifest(path).metric
            except CheckpointError:
                metric = None  # listed all the same, so that a reader hears of the damage when it loads
            found[int(match[1])] = CheckpointInfo(path=path, step=int(match[1]), metric=metric)
    return [found[step] for step in sorted(found)]


def _is_there(path: Path, strict: bool) -> bool:
    """Whether there is something; that nobody may look is no answer, if `strict`."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if strict:
            raise CheckpointError(f"{path} cannot be looked at: {error}") from error
        return False
    return True


def has_all_bytes(path: Path) -> bool:
    """Whether the files have their sizes; their content is not read."""
    try:
        check_files(path, read_manifest(path))
    except CheckpointError:
        return False
    return True


def best_of(infos: Sequence[CheckpointInfo]) -> CheckpointInfo | None:
    """The lowest metric, of equal ones the newest."""
    scored = [(info.metric, -info.step, info) for info in infos if info.metric is not None]
    return min(scored, key=lambda item: item[:2])[2] if scored else None


def _is_sealed(found: dict[str, Any], raw: bytes) -> bool:
    body = {key: value for key, value in found.items() if key != "sha256"}
    try:
        # The text is compared too: JSON spells a value in many ways, a flipped bit may make another.
        return found.get("sha256") == hashlib.sha256(_canonical(body)).hexdigest() and _canonical(found) == raw
    except RecursionError:
        return False


def _canonical(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite")
    return value


def _parse(found: dict[str, Any], where: Path) -> Manifest:
    """The fields of a sealed manifest. A seal is no signature, so nothing is taken on trust."""
    schema, step, metric, listed = (found.get(key) for key in ("schema", "step", "metric", "files"))
    if type(schema) is not int or schema < 1 or type(step) is not int or step < 0:
        raise CheckpointError(f"{where} has schema {schema!r}, step {step!r}; wanted schema 1..{SCHEMA}, step >= 0")
    if not (metric is None or type(metric) in (int, float)) or not isinstance(listed, list):
        raise CheckpointError(f"{where} has metric {metric!r}; wanted a number or null, and a list of files")
    files = []
    for entry in listed:
        if not isinstance(entry, dict) or entry.keys() != {"name", "bytes", "sha256"}:
            raise CheckpointError(f"{where} lists {str(entry)[:200]!r}; wanted name, bytes, sha256")
        name, size, digest = entry["name"], entry["bytes"], entry["sha256"]
        stem = name.removesuffix(".safetensors") if isinstance(name, str) else ""
        if name != STATE and (stem == name or not STEM.fullmatch(stem)):
            raise CheckpointError(
                f"{where} lists the file {str(name)[:200]!r}; wanted {STATE} or a plain *.safetensors"
            )
        if type(size) is not int or size < 0 or not isinstance(digest, str):
            raise CheckpointError(f"{where} lists {name} with {size!r} bytes, SHA-256 {digest!r}")
        files.append(FileRecord(name=name, bytes=size, sha256=digest))
    names = [file.name for file in files]
    if len(set(names)) != len(names) or STATE not in names:
        raise CheckpointError(f"{where} lists {', '.join(names)[:200]}; wanted each once and {STATE} among them")
    return Manifest(step=step, metric=metric, files=tuple(files))


def state_text(state: Mapping[str, Any]) -> bytes:
    """The JSON of a checkpoint's state, from which it comes back equal.

    Raises:
        CheckpointError: JSON lacks the type of a value, or the text is longer than `STATE_LIMIT`.
        NonFiniteError: a float is not finite.
    """
    _check_state(state, "state", 0)
    try:
        text = json.dumps(state, allow_nan=False).encode()
    except ValueError as error:
        raise CheckpointError(f"state cannot be written as JSON: {error}") from error
    if len(text) > STATE_LIMIT:
        raise CheckpointError(f"state is {len(text)} bytes of JSON; wanted at most {STATE_LIMIT}")
    return text


def _check_state(value: object, where: str, depth: int) -> None:
    """Refuse what would not come back equal from JSON."""
    if depth > 100:
        raise CheckpointError(f"{where[:200]} is nested deeper than 100 levels")
    if isinstance(value, float) and not math.isfinite(value):
        raise NonFiniteError(f"{where} is {value}; wanted a finite number or None")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{where} has the key {key!r} of type {type(key).__name__}; wanted str")
            _check_state(item, f"{where}.{key}", depth + 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_state(item, f"{where}[{index}]", depth + 1)
    elif not (value is None or isinstance(value, bool | int | float | str)):
        raise CheckpointError(f"{where} is a {type(value).__name__}; wanted dict, list, str, int, float, bool or None")
