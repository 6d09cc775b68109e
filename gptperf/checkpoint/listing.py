"""Lists the checkpoints of a directory and finds the best one. Loads no torch."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptperf.checkpoint.manifest import MANIFEST, STEP, check_files, read_manifest
from gptperf.errors import CheckpointError

__all__ = ["SET_ASIDE", "CheckpointInfo", "best_of", "has_all_bytes", "list_checkpoints"]

SET_ASIDE = re.compile(r"\.old-(\d{8,18})-[0-9a-f]{8}", re.ASCII)
"""Name that an older checkpoint of the same step has during a save, until the new one has taken its place."""


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """A checkpoint on disk whose files are not verified yet."""

    path: Path
    step: int
    metric: float | None
    """Metric in the manifest; None if the checkpoint was saved without one, or if the manifest cannot be read."""


def list_checkpoints(directory: Path, *, strict: bool = False) -> list[CheckpointInfo]:
    """Lists the checkpoints that have a manifest, oldest first.

    A checkpoint that a save has set aside is listed under its step if no other checkpoint of that step exists.

    Args:
        directory: Directory of the checkpoints of a run; it may be absent.
        strict: Raise an error where the existence of a manifest cannot be determined, instead of leaving the
            checkpoint out.

    Raises:
        CheckpointError: The directory cannot be read; with `strict`, also a manifest that cannot be examined.
    """
    try:
        names = sorted(os.listdir(directory), reverse=True)  # "step-..." comes before ".old-..."
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error}") from error
    found: dict[int, CheckpointInfo] = {}
    for name in names:
        match = STEP.fullmatch(name) or SET_ASIDE.fullmatch(name)
        path = directory / name
        if match and int(match[1]) not in found and not path.is_symlink() and _exists(path / MANIFEST, strict):
            try:
                metric = read_manifest(path).metric
            except CheckpointError:
                metric = None  # the checkpoint is still listed, so that loading it reports the corruption
            found[int(match[1])] = CheckpointInfo(path=path, step=int(match[1]), metric=metric)
    return [found[step] for step in sorted(found)]


def _exists(path: Path, strict: bool) -> bool:
    """Returns whether `path` exists; with `strict`, raises an error where that cannot be determined."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if strict:
            raise CheckpointError(f"{path} cannot be examined: {error}") from error
        return False
    return True


def has_all_bytes(path: Path) -> bool:
    """Returns whether a checkpoint has all its files in the right sizes; their content is not read."""
    try:
        check_files(path, read_manifest(path))
    except CheckpointError:
        return False
    return True


def best_of(infos: Sequence[CheckpointInfo]) -> CheckpointInfo | None:
    """Returns the checkpoint with the lowest metric, or None if none has a metric; of equal ones, the newest."""
    scored = [(info.metric, -info.step, info) for info in infos if info.metric is not None]
    return min(scored, key=lambda item: item[:2])[2] if scored else None
