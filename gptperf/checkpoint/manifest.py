"""The sealed manifest of a checkpoint, and the verification of its files by size and SHA-256. Loads no torch.

`MANIFEST.json` lists every other file of the checkpoint with its bytes and SHA-256. It is sealed: it holds the SHA-256
of its own other fields, so a flipped bit in the manifest itself is found too.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gptperf.checkpoint.strict_json import parse_json
from gptperf.errors import CheckpointError
from gptperf.files import FileRecord, open_regular
from gptperf.formats import counted

__all__ = [
    "MANIFEST",
    "SCHEMA",
    "STATE",
    "STEM",
    "STEP",
    "CheckpointManifest",
    "NewerSchemaError",
    "check_files",
    "check_hash",
    "read_file",
    "read_manifest",
    "seal",
]

SCHEMA = 1
"""Number of the layout that `save` writes; a checkpoint with a greater number is refused.

Every later layout must keep the fields `schema` and `sha256` of the manifest as they are, because they distinguish a
checkpoint of a newer gptperf from a corrupt one.
"""

MANIFEST = "MANIFEST.json"
STATE = "state.json"
MANIFEST_LIMIT = 1 << 22
"""Maximum size of a manifest in bytes."""
READ_CHUNK = 1 << 24
"""Bytes that are read and hashed at a time."""
STEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)
"""Name of a tensor file without its suffix."""
STEP = re.compile(r"step-(\d{8,18})", re.ASCII)
"""Name of a checkpoint's directory."""


@dataclass(frozen=True, kw_only=True)
class CheckpointManifest:
    """The content of `MANIFEST.json`."""

    step: int
    metric: float | None
    files: tuple[FileRecord, ...]


class NewerSchemaError(CheckpointError):
    """A newer gptperf wrote this intact checkpoint. Resuming from an older checkpoint instead would fork the run."""


def seal(step: int, metric: float | None, files: Iterable[FileRecord], schema: int = SCHEMA) -> bytes:
    """Returns the text of a manifest, with the SHA-256 of its own other fields."""
    body = {"schema": schema, "step": step, "metric": metric, "files": [asdict(file) for file in files]}
    return _canonical({**body, "sha256": hashlib.sha256(_canonical(body)).hexdigest()})


def read_manifest(path: Path) -> CheckpointManifest:
    """Reads and checks the manifest of the checkpoint in the directory `path`.

    Raises:
        NewerSchemaError: A newer gptperf wrote it.
        CheckpointError: The manifest is missing or corrupt, or belongs to another step.
    """
    where = path / MANIFEST
    if path.is_symlink():
        raise CheckpointError(f"{path} is a symbolic link; wanted the checkpoint's own directory")
    raw = read_file(where, MANIFEST_LIMIT)
    found = parse_json(raw, where)
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} is corrupt: it holds a {type(found).__name__}; wanted an object")
    sealed = _is_sealed(found, raw)
    schema = found.get("schema")
    if type(schema) is int and schema > SCHEMA:
        text = f"{where} has schema {schema}, this gptperf reads up to {SCHEMA}: it needs a newer gptperf"
        raise (NewerSchemaError(text) if sealed else CheckpointError(f"{text}, or it is corrupt: its seal is broken"))
    if not sealed:
        raise CheckpointError(f"{where} is corrupt: its content does not have the SHA-256 that it names")
    manifest = _parse(found, where)
    named = STEP.fullmatch(path.name)
    if named and int(named[1]) != manifest.step:
        raise CheckpointError(f"{where} is of step {manifest.step}; wanted {int(named[1])}, as the directory says")
    return manifest


def check_files(path: Path, manifest: CheckpointManifest) -> None:
    """Checks that a directory holds exactly the files of the manifest, as regular files of the right sizes.

    Raises:
        CheckpointError: The files differ; the message names one with its expected and actual size.
    """
    wanted = {file.name: file.bytes for file in manifest.files}
    try:
        present = set(os.listdir(path)) - {MANIFEST}
        for name in sorted(wanted.keys() - present):
            raise CheckpointError(f"{path / name} is missing; wanted {counted(wanted[name], 'byte')}")
        for name in sorted(present - wanted.keys()):
            raise CheckpointError(f"{path / name} is not in {MANIFEST}; wanted only {', '.join(sorted(wanted))}")
        for name, size in wanted.items():
            status = os.lstat(path / name)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path / name} is not a regular file")
            if status.st_size != size:
                raise CheckpointError(f"{path / name} has {counted(status.st_size, 'byte')}; wanted {size:,}")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def check_hash(path: Path, file: FileRecord) -> None:
    """Compares the content of a file of the checkpoint `path` with its SHA-256.

    Raises:
        CheckpointError: The content differs, or cannot be read.
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
            f"{path / file.name} is corrupt: {counted(size, 'byte')} with SHA-256 {digest.hexdigest()}; "
            f"wanted {counted(file.bytes, 'byte')} with {file.sha256}"
        )


def read_file(path: Path, limit: int) -> bytes:
    """Returns the content of a regular file of at most `limit` bytes.

    Raises:
        CheckpointError: The file is longer, or cannot be read.
    """
    try:
        with open(open_regular(path), "rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if len(data) > limit:
        raise CheckpointError(f"{path} has more than {counted(limit, 'byte')}, the most that gptperf writes")
    return data


def _is_sealed(found: dict[str, Any], raw: bytes) -> bool:
    body = {key: value for key, value in found.items() if key != "sha256"}
    try:
        # The text is compared as well: JSON has several spellings of one value, and a flipped bit may change one
        # spelling into another.
        return found.get("sha256") == hashlib.sha256(_canonical(body)).hexdigest() and _canonical(found) == raw
    except RecursionError:
        return False


def _canonical(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"


def _parse(found: dict[str, Any], where: Path) -> CheckpointManifest:
    """Returns the fields of a sealed manifest. The seal proves no author, so every field is checked."""
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
        raise CheckpointError(f"{where} lists {', '.join(names)[:200]}; wanted each file once, and {STATE}")
    return CheckpointManifest(step=step, metric=metric, files=tuple(files))
