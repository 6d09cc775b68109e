"""Checkpoints: atomic to save, verified before use, free of pickle.

    DIRECTORY/step-00000042/   a safetensors file a group of tensors and process, state.json, MANIFEST.json
    DIRECTORY/index.jsonl      what was saved when, for people; nothing reads it

`save` writes and syncs every file in `.tmp-00000042-NONCE` and renames that directory: `step-*` is complete
or absent whatever kills the process. `MANIFEST.json` holds the bytes and the SHA-256 of every file and seals
itself; `load` hands out nothing that it has not checked. The newest checkpoint is computed, never a link.
"""

import errno
import json
import math
import os
import re
import secrets
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from gptperf.checkpoint.manifest import (
    MANIFEST,
    SET_ASIDE,
    STATE,
    STEM,
    CheckpointInfo,
    best_of,
    has_all_bytes,
    list_checkpoints,
    seal,
    state_text,
)
from gptperf.checkpoint.tensor_file import (
    check_finite,
    header,
    write_tensors,
)
from gptperf.distributed.agreement import Ranks, SingleRank, fail_together
from gptperf.errors import CheckpointError, DiskError, NonFiniteError
from gptperf.files import (
    FileRecord,
    append_line,
    delete,
    make_directory,
    sync_directory,
    write_file,
)

__all__ = ["FAILPOINTS", "JSON", "clean", "prune", "save"]

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

FAILPOINTS = (
    "tmp_made",
    "tensors_half_written",
    "tensors_written",
    "tensors_synced",
    "state_half_written",
    "state_synced",
    "manifest_half_written",
    "manifest_synced",
    "tmp_synced",
    "same_step_set_aside",
    "renamed",
    "parent_synced",
    "index_half_written",
    "index_synced",
    "prune_renamed",
    "prune_half_deleted",
    "pruned",
)
"""Where `GPTPERF_FAILPOINT=save.N` (N from 1) kills `save`, or `save.N:enospc` finds the disk full."""


def save(
    directory: Path,
    *,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, JSON],
    keep: int = 3,
    metric: float | None = None,
    peers: Ranks | None = None,
) -> Path:
    """Save one step; afterwards the disk holds the whole checkpoint, or what it held before.

    Several processes, on a file system that they share, write their tensors side by side; the first one seals and
    renames when all have. What one of them cannot do fails for all.

    Args:
        directory: Where the checkpoints of the run lie; made if absent. The caller holds its `RunLock`.
        step: Names the checkpoint; a complete one of the same step is replaced.
        tensors: File stem ("model", "optimizer") to named tensors, on any device; views of a shared storage
            are welcome. At most 16 MiB, or one tensor that is not contiguous, are copied at a time.
        state: JSON values; a float comes back with the same bits.
        keep: How many of the newest checkpoints stay, beside the best one and this one.
        metric: Lower is better, for `best`.
        peers: who saves besides; default: nobody.

    Returns:
        The checkpoint's directory.

    Raises:
        NonFiniteError: A tensor, a float of `state` or `metric` is not finite; nothing was written.
        DiskError: The disk is full or cannot be written; the earlier checkpoints are untouched.
        CheckpointError: A value cannot be stored: a dtype, a name, a type that JSON lacks.
    """
    hit = _failpoints()
    if not 0 <= step < 10**18 or keep < 1:
        raise ValueError(f"step {step}, keep {keep}; wanted step >= 0 and keep >= 1")
    if metric is not None and not math.isfinite(metric):
        raise NonFiniteError(f"metric of step {step} is {metric}; wanted a finite number or None")
    text = state_text(state)
    peers = peers or SingleRank()
    failed = f"saving step {step} in {directory}"
    suffix = f"-{peers.rank:05d}" if peers.world_size > 1 else ""
    headers = {}
    with fail_together(peers, failed):
        for stem, named in tensors.items():
            if not STEM.fullmatch(stem):
                raise CheckpointError(f"file stem {stem!r}; wanted letters, digits, '-' and '_', at most 64")
            headers[stem] = header(stem, named)
            check_finite(stem, named)
    directory = Path(directory)
    nonce = peers.exchange(secrets.token_hex(4))[0]
    tmp = directory / f".tmp-{step:08d}-{nonce}"
    final = directory / f"step-{step:08d}"
    try:
        with fail_together(peers, failed):
            if peers.rank == 0:
                make_directory(directory)
                tmp.mkdir(mode=0o700)
                hit("tmp_made")
        files = []
        with fail_together(peers, failed):
            for stem, named in tensors.items():
                half, written = (lambda: hit("tensors_half_written")), (lambda: hit("tensors_written"))
                path = tmp / f"{stem}{suffix}.safetensors"
                files.append(write_tensors(path, named, headers[stem], half=half, written=written))
                hit("tensors_synced")
        files = [file for part in peers.exchange(files) for file in part]
        with fail_together(peers, failed):
            if peers.rank == 0:
                _seal_and_publish(step, metric, files, text, tmp, final, keep, hit)
    finally:
        if peers.rank == 0:
            shutil.rmtree(tmp, ignore_errors=True)  # after the rename there is none
    return final


def _seal_and_publish(
    step: int,
    metric: float | None,
    files: list[FileRecord],
    text: bytes,
    tmp: Path,
    final: Path,
    keep: int,
    hit: Callable[[str], None],
) -> None:
    """Make a checkpoint of the files that all processes have written."""
    directory, nonce = final.parent, tmp.name.rpartition("-")[2]
    files = [*files, write_file(tmp / STATE, [text], len(text), half=lambda: hit("state_half_written"))]
    hit("state_synced")
    manifest = seal(step, metric, files)
    write_file(tmp / MANIFEST, [manifest], len(manifest), half=lambda: hit("manifest_half_written"))
    hit("manifest_synced")
    sync_directory(tmp)
    hit("tmp_synced")
    _publish(tmp, final, directory / f".old-{step:08d}-{nonce}", hit)
    entry = {
        "step": step,
        "metric": metric,
        "name": final.name,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    append_line(directory / "index.jsonl", json.dumps(entry).encode(), half=lambda: hit("index_half_written"))
    hit("index_synced")
    _prune(directory, keep, final, hit)


def prune(directory: Path, *, keep: int) -> list[str]:
    """Delete all but the newest `keep` checkpoints and the best one; returns the deleted names.

    A checkpoint whose files lack bytes is not counted, so that `keep` usable ones stay.

    Raises:
        DiskError: The directory cannot be written.
    """
    if keep < 1:
        raise ValueError(f"keep {keep}; wanted at least 1")
    try:
        return _prune(Path(directory), keep, None, lambda name: None)
    except OSError as error:
        raise DiskError(f"pruning checkpoints in {directory} failed: {error}") from error


def clean(directory: Path) -> list[str]:
    """Remove what killed saves left behind, and put back a checkpoint that one had set aside.

    To be called at the start of a run that holds the `RunLock`, by one process.

    Returns:
        The names that are gone.

    Raises:
        DiskError: The directory cannot be written.
    """
    directory = Path(directory)
    gone = []
    try:
        for name in sorted(os.listdir(directory)) if directory.is_dir() else []:
            aside = SET_ASIDE.fullmatch(name)
            if aside and not os.path.lexists(directory / f"step-{aside[1]}"):
                os.rename(directory / name, directory / f"step-{aside[1]}")
            elif aside or name.startswith((".tmp-", ".trash-")):
                delete(directory / name)
            else:
                continue
            gone.append(name)
        if gone:
            sync_directory(directory)
    except OSError as error:
        raise DiskError(f"cleaning {directory} failed: {error}") from error
    return gone


def _failpoints() -> Callable[[str], None]:
    """Read `GPTPERF_FAILPOINT` and return the function that `save` calls at each point."""
    text = os.environ.get("GPTPERF_FAILPOINT", "")
    if not text.startswith("save."):
        return lambda name: None
    match = re.fullmatch(r"save\.(\d{1,2})(:enospc)?", text, re.ASCII)
    if match is None or not 1 <= int(match[1]) <= len(FAILPOINTS):
        raise ValueError(f"GPTPERF_FAILPOINT={text}; wanted save.N or save.N:enospc, N in 1..{len(FAILPOINTS)}")
    wanted, full = FAILPOINTS[int(match[1]) - 1], match[2] is not None

    def hit(name: str) -> None:
        if name == wanted and full:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (failpoint {name})")
        if name == wanted:
            os.kill(os.getpid(), signal.SIGKILL)

    return hit


def _publish(tmp: Path, final: Path, aside: Path, hit: Callable[[str], None]) -> None:
    """Rename the complete `tmp` to `final`; a checkpoint that is there gives way only now.

    rename(2) does not replace a directory that has entries, so the old one steps aside first. Between the two
    renames `checkpoints` finds it under that name, and `clean` puts it back.
    """
    replaces = os.path.lexists(final)
    try:
        if replaces:
            os.rename(final, aside)
            hit("same_step_set_aside")
        os.rename(tmp, final)
    except OSError:
        if replaces and not os.path.lexists(final):
            os.rename(aside, final)
        raise
    hit("renamed")
    sync_directory(final.parent)
    hit("parent_synced")
    if replaces:
        delete(aside)


def _prune(directory: Path, keep: int, saved: Path | None, hit: Callable[[str], None]) -> list[str]:
    whole: list[CheckpointInfo] = []
    doomed: list[CheckpointInfo] = []
    for info in reversed(list_checkpoints(directory)):
        if len(whole) >= keep:
            doomed.append(info)
        elif has_all_bytes(info.path):
            whole.append(info)
    winner = best_of([info for info in [*whole, *doomed] if has_all_bytes(info.path)])
    spared = {saved, winner.path if winner else None}
    doomed = [info for info in doomed if info.path not in spared]
    trash = []
    for info in doomed:
        trash.append(directory / f".trash-{info.path.name.lstrip('.')}-{secrets.token_hex(4)}")
        os.rename(info.path, trash[-1])
        hit("prune_renamed")
    if trash:
        sync_directory(directory)  # a half deleted directory must not come back under its old name
    for path in trash:
        delete(path, lambda: hit("prune_half_deleted"))
        hit("pruned")
    return [info.path.name for info in doomed]
