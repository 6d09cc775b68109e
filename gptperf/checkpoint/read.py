"""Reading checkpoints: what a run has, and the newest good one; every byte is verified before a tensor is used."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptperf.checkpoint.manifest import (
    MANIFEST,
    STATE,
    STATE_LIMIT,
    CheckpointInfo,
    NewerSchemaError,
    best_of,
    check_files,
    check_hash,
    list_checkpoints,
    parse_json,
    read_file,
    read_manifest,
)
from gptperf.checkpoint.tensor_file import Part, join, parts, read_tensors
from gptperf.errors import CheckpointError

__all__ = ["Checkpoint", "best", "checkpoints", "latest", "load", "load_latest", "stored"]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint in memory: `tensors` by file stem and name, `state` as it was given to `save`."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    metric: float | None


def checkpoints(directory: Path, *, strict: bool = False) -> list[CheckpointInfo]:
    """All checkpoints of a run, oldest first, not yet verified; what has no manifest is none.

    Raises:
        CheckpointError: see `list_checkpoints`.
    """
    return list_checkpoints(Path(directory), strict=strict)


def latest(directory: Path) -> CheckpointInfo | None:
    """The checkpoint of the greatest step."""
    found = checkpoints(directory)
    return found[-1] if found else None


def best(directory: Path) -> CheckpointInfo | None:
    """The checkpoint of the lowest metric, of equal ones the newest; None where none has a metric."""
    return best_of(checkpoints(directory))


def load(
    path: Path, *, device: str | torch.device = "cpu", only: Sequence[str] | None = None, later: Sequence[str] = ()
) -> Checkpoint:
    """Load a checkpoint; every file is verified before a tensor of it is used.

    Args:
        path: Its directory.
        device: Where the tensors shall lie.
        only: File stems to read, such as ("model",); of the others the size alone is checked. None: all.
        later: File stems that are verified, but left to `stored`.

    Raises:
        CheckpointError: Damaged, incomplete or of a newer schema; names the file, wanted and found bytes.
    """
    path = Path(path)
    manifest = read_manifest(path)
    check_files(path, manifest)
    wanted = [f for f in manifest.files if only is None or _group(f.name) in only or f.name == STATE]
    for file in wanted:
        check_hash(path, file)
    state = parse_json(read_file(path / STATE, STATE_LIMIT), path / STATE)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path / STATE} holds a {type(state).__name__}; wanted an object")
    names = [file.name for file in wanted if file.name != STATE and _group(file.name) not in later]
    tensors: dict[str, dict[str, Tensor]] = {}
    for name in names:
        tensors.setdefault(_group(name), {}).update(read_tensors(path / name, device))
    joined = {stem: join(named, f"{path}: {stem}") for stem, named in tensors.items()}
    return Checkpoint(path=path, step=manifest.step, tensors=joined, state=state, metric=manifest.metric)


def _group(file: str) -> str:
    """The stem that a file's tensors were saved under, whichever process wrote it."""
    return re.sub(r"(-\d{5})?\.safetensors$", "", file)


def stored(path: Path, stem: str) -> Iterator[Part]:
    """What the files of a stem hold, each part until the next one is asked for: no more than one is in memory.

    Raises:
        CheckpointError: A file is none that gptperf writes.
    """
    for file in read_manifest(path).files:
        if _group(file.name) == stem:
            yield from parts(path / file.name)


def load_latest(
    directory: Path,
    *,
    warn: Callable[[str], None],
    device: str | torch.device = "cpu",
    later: Sequence[str] = (),
) -> Checkpoint | None:
    """Load the newest good checkpoint; None where the run has none.

    Args:
        directory: Where the checkpoints of the run lie.
        warn: Gets one line for each directory that is passed over.
        device: Where the tensors shall lie.
        later: As for `load`.

    Raises:
        CheckpointError: All that there are are damaged, or the newest undamaged one needs a newer gptperf.
    """
    directory = Path(directory)
    found = checkpoints(directory, strict=True)
    for path in sorted(directory.glob("step-*")):
        if path not in [info.path for info in found]:
            warn(f"{path} is not a checkpoint (no {MANIFEST} of its own) and is passed over")
    failure: CheckpointError | None = None
    if not found and (others := sorted(path.name for path in directory.glob("step-*"))):
        raise CheckpointError(
            f"{directory}: found {', '.join(others[:5])} without {MANIFEST}; wanted checkpoints, or none"
        )
    for info in reversed(found):
        try:
            loaded = load(info.path, device=device, later=later)
        except NewerSchemaError:
            raise
        except CheckpointError as error:
            warn(f"CHECKPOINT DAMAGED, going back to the one before step {info.step}: {error}")
            failure = error
        else:
            return loaded
    if failure is not None:
        raise CheckpointError(f"all {len(found)} checkpoints in {directory} are damaged; the oldest: {failure}")
    return None
