"""Reads checkpoints. Every byte is verified before a tensor is used."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptperf.checkpoint.listing import CheckpointInfo, best_of, list_checkpoints
from gptperf.checkpoint.manifest import (
    MANIFEST,
    STATE,
    NewerSchemaError,
    check_files,
    check_hash,
    read_file,
    read_manifest,
)
from gptperf.checkpoint.strict_json import STATE_LIMIT, parse_json
from gptperf.checkpoint.tensor_file import Part, join, parts, read_tensors
from gptperf.errors import CheckpointError
from gptperf.formats import counted

__all__ = ["Checkpoint", "best", "checkpoints", "latest", "load", "load_latest", "stored"]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint in memory."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    """File stem -> named tensors, as they were passed to `save`."""
    state: dict[str, Any]
    """The JSON values that were passed to `save`."""
    metric: float | None


def checkpoints(directory: Path, *, strict: bool = False) -> list[CheckpointInfo]:
    """Lists the checkpoints of a run, oldest first, without verifying them; see `list_checkpoints`.

    Raises:
        CheckpointError: As in `list_checkpoints`.
    """
    return list_checkpoints(Path(directory), strict=strict)


def latest(directory: Path) -> CheckpointInfo | None:
    """Returns the checkpoint of the greatest step, or None if there is none."""
    found = checkpoints(directory)
    return found[-1] if found else None


def best(directory: Path) -> CheckpointInfo | None:
    """Returns the checkpoint with the lowest metric, or None if none has a metric; of equal ones, the newest."""
    return best_of(checkpoints(directory))


def load(
    path: Path, *, device: str | torch.device = "cpu", only: Sequence[str] | None = None, later: Sequence[str] = ()
) -> Checkpoint:
    """Loads a checkpoint after it has verified every file that it reads.

    Args:
        path: Directory of the checkpoint.
        device: Device of the tensors.
        only: File stems to read, such as ("model",); None reads all. Of the other files only the sizes are checked.
        later: File stems that are verified but not loaded; `stored` reads them part by part.

    Raises:
        CheckpointError: The checkpoint is corrupt, incomplete or of a newer schema; the message names the file.
    """
    path = Path(path)
    manifest = read_manifest(path)
    check_files(path, manifest)
    wanted = [f for f in manifest.files if only is None or _stem(f.name) in only or f.name == STATE]
    for file in wanted:
        check_hash(path, file)
    state = parse_json(read_file(path / STATE, STATE_LIMIT), path / STATE)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path / STATE} holds a {type(state).__name__}; wanted an object")
    names = [file.name for file in wanted if file.name != STATE and _stem(file.name) not in later]
    tensors: dict[str, dict[str, Tensor]] = {}
    for name in names:
        tensors.setdefault(_stem(name), {}).update(read_tensors(path / name, device))
    joined = {stem: join(named, f"{path}: {stem}") for stem, named in tensors.items()}
    return Checkpoint(path=path, step=manifest.step, tensors=joined, state=state, metric=manifest.metric)


def _stem(file: str) -> str:
    """Returns the stem under which the tensors of a file were saved: its name without suffix and rank."""
    return re.sub(r"(-\d{5})?\.safetensors$", "", file)


def stored(path: Path, stem: str) -> Iterator[Part]:
    """Yields the parts of tensors that the files of a stem hold; one part is in memory at a time.

    A part is valid until the next one is requested. `load` must have verified the files.

    Raises:
        CheckpointError: A file is not one that gptperf wrote.
    """
    for file in read_manifest(path).files:
        if _stem(file.name) == stem:
            yield from parts(path / file.name)


def load_latest(
    directory: Path,
    *,
    warn: Callable[[str], None],
    device: str | torch.device = "cpu",
    later: Sequence[str] = (),
) -> Checkpoint | None:
    """Loads the newest intact checkpoint; corrupt ones are skipped with a warning.

    Args:
        directory: Directory of the checkpoints of the run.
        warn: Called with one line for each directory that is skipped.
        device: Device of the tensors.
        later: As in `load`.

    Returns:
        The checkpoint, or None where the run has none.

    Raises:
        CheckpointError: Every checkpoint is corrupt, or the newest intact one needs a newer gptperf.
    """
    directory = Path(directory)
    found = checkpoints(directory, strict=True)
    for path in sorted(directory.glob("step-*")):
        if path not in [info.path for info in found]:
            warn(f"{path} is skipped: it is not a checkpoint (no {MANIFEST} of its own)")
    failure: CheckpointError | None = None
    if not found and (others := sorted(path.name for path in directory.glob("step-*"))):
        raise CheckpointError(
            f"{directory}: found only folders without {MANIFEST}, which are no checkpoints: "
            f"{', '.join(others[:5])}; wanted a checkpoint, or an empty folder"
        )
    for info in reversed(found):
        try:
            loaded = load(info.path, device=device, later=later)
        except NewerSchemaError:
            raise
        except CheckpointError as error:
            warn(f"CHECKPOINT CORRUPT, going back to the one before step {info.step}: {error}")
            failure = error
        else:
            return loaded
    if failure is not None:
        raise CheckpointError(
            f"{directory}: found {counted(len(found), 'checkpoint')}, but none that can be read; the oldest: {failure}"
        )
    return None
