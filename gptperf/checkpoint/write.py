"""Saves checkpoints atomically, and deletes old ones.

    DIRECTORY/step-00000042/   safetensors files (one per group of tensors and rank), state.json, MANIFEST.json
    DIRECTORY/index.jsonl      list of the saves with their times, for people; no code reads it

`save` writes and syncs every file in `.tmp-00000042-NONCE`, then renames that directory. So `step-*` is complete or
absent, whatever kills the process. `MANIFEST.json` holds the size and the SHA-256 of every other file, and a SHA-256 of
its own content. No link names the newest checkpoint: it is the one with the greatest step.
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
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from gptperf.checkpoint.listing import SET_ASIDE, CheckpointInfo, best_of, has_all_bytes, list_checkpoints
from gptperf.checkpoint.manifest import MANIFEST, STATE, STEM, seal
from gptperf.checkpoint.strict_json import JSON, state_text
from gptperf.checkpoint.tensor_file import check_finite, header, write_tensors
from gptperf.distributed.agreement import Ranks, SingleRank, fail_together
from gptperf.errors import CheckpointError, DiskError, NonFiniteError
from gptperf.files import FileRecord, append_line, delete, make_directory, sync_directory, write_file

__all__ = ["FAILPOINTS", "clean", "prune", "save"]

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
"""Points of a save, for tests. `GPTPERF_FAILPOINT=save.N` kills the process at point N, counted from 1;
`save.N:enospc` raises the error of a full disk there."""


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
    """Saves one step. Afterwards the disk holds the complete checkpoint, or what it held before.

    Collective: every rank of `peers` must call it with its own tensors. The ranks share a file system and write their
    files side by side; when all have written, rank 0 seals the manifest and renames the directory. An error of one rank
    is raised on every rank.

    Args:
        directory: Directory of the checkpoints of the run; it is made if absent. The caller holds its `RunLock`.
        step: Step of the checkpoint; a complete checkpoint of the same step is replaced.
        tensors: File stem ("model", "optimizer") -> named tensors on any device. Views may share a storage. At most
            16 MiB, or one non-contiguous tensor, are copied at a time.
        state: JSON values; a float is read back with the same bits.
        keep: Number of the newest checkpoints to keep; the best one and this one are kept too.
        metric: Value for `best`; lower is better.
        peers: The ranks that save together; None for a single process.

    Returns:
        Directory of the checkpoint.

    Raises:
        NonFiniteError: A tensor, a float of `state` or `metric` is not finite; nothing was written.
        DiskError: The disk is full or cannot be written; the earlier checkpoints are unchanged.
        CheckpointError: A value cannot be stored: a dtype, a name, or a type that JSON does not have.
    """
    if not 0 <= step < 10**18 or keep < 1:
        raise ValueError(f"step {step}, keep {keep}; wanted step >= 0 and keep >= 1")
    if metric is not None and not math.isfinite(metric):
        raise NonFiniteError(f"metric of step {step} is {metric}; wanted a finite number or None")
    hit, text = _failpoints(), state_text(state)
    peers, failed = peers or SingleRank(), f"saving step {step} in {directory}"
    headers = {}
    with fail_together(peers, failed):
        for stem, named in tensors.items():
            if not STEM.fullmatch(stem):
                raise CheckpointError(f"file stem {stem!r}; wanted letters, digits, '-' and '_', at most 64")
            headers[stem] = header(stem, named)
            check_finite(stem, named)
    nonce = peers.exchange(secrets.token_hex(4))[0]  # every rank takes the name that rank 0 has drawn
    tmp, final = Path(directory) / f".tmp-{step:08d}-{nonce}", Path(directory) / f"step-{step:08d}"

    def publish(files: list[FileRecord]) -> None:
        _seal_and_publish(step, metric, files, text, tmp, final, keep, hit)

    try:
        _write_together(tmp, tensors, headers, peers, failed, publish, hit)
    finally:
        if peers.rank == 0:
            shutil.rmtree(tmp, ignore_errors=True)  # after the rename there is no such directory
    return final


def _write_together(
    tmp: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    headers: Mapping[str, tuple[list[str], bytes]],
    peers: Ranks,
    failed: str,
    publish: Callable[[list[FileRecord]], None],
    hit: Callable[[str], None],
) -> None:
    """Writes the tensor files of every rank into `tmp`; rank 0 then calls `publish` with all of them.

    Each `fail_together` is a barrier that raises the error of any rank on every rank; `failed` begins the message.
    """
    suffix = f"-{peers.rank:05d}" if peers.world_size > 1 else ""
    with fail_together(peers, failed):
        if peers.rank == 0:
            make_directory(tmp.parent)
            tmp.mkdir()
            hit("tmp_made")
    files = []
    with fail_together(peers, failed):
        for stem, named in tensors.items():
            half, written = (lambda: hit("tensors_half_written")), (lambda: hit("tensors_written"))
            path = tmp / f"{stem}{suffix}.safetensors"
            files.append(write_tensors(path, named, headers[stem], half=half, written=written))
            hit("tensors_synced")
    # The manifest is sealed only now, when every file of every rank is synced.
    files = [file for part in peers.exchange(files) for file in part]
    with fail_together(peers, failed):
        if peers.rank == 0:
            publish(files)


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
    """Completes the checkpoint in `tmp`, renames it to `final` and deletes old checkpoints.

    The order is what makes a save atomic. The manifest is written last, so a directory with a manifest has all its
    files; the directory is synced before the rename, so that no file can be missing from it after a power cut; and old
    checkpoints are deleted only when the new one is durable.
    """
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
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    append_line(directory / "index.jsonl", json.dumps(entry).encode(), half=lambda: hit("index_half_written"))
    hit("index_synced")
    _prune(directory, keep, final, hit)


def prune(directory: Path, *, keep: int) -> list[str]:
    """Deletes all checkpoints but the newest `keep` and the best one, and returns the deleted names.

    A checkpoint with a missing or short file does not count, so that `keep` usable ones remain.

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
    """Removes what killed saves left behind, and restores the name of a checkpoint that a killed save had set aside.

    One process calls it at the start of a run, while it holds the `RunLock`.

    Returns:
        The names that no longer exist.

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
    """Returns the function that `save` calls at each of its points, according to `GPTPERF_FAILPOINT`."""
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
    """Renames the complete `tmp` to `final`; an older checkpoint of the same step is renamed to `aside` first.

    rename(2) does not replace a directory that has entries. Between the two renames `checkpoints` lists the older one
    under its other name, and `clean` renames it back.
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
    """Deletes old checkpoints, but not `saved`; see `prune`."""
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
        sync_directory(directory)  # after a power cut a half-deleted checkpoint must not have its old name
    for path in trash:
        delete(path, lambda: hit("prune_half_deleted"))
        hit("pruned")
    return [info.path.name for info in doomed]
