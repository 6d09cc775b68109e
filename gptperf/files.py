"""Files that survive a power cut, the lock of a run, room on the disk; no knowledge of what bytes mean."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import socket
import stat
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from gptperf.errors import CheckpointError, DiskError

__all__ = [
    "FileRecord",
    "RunLock",
    "append_line",
    "check_space",
    "delete",
    "free_bytes",
    "make_directory",
    "open_regular",
    "replace_text",
    "sync_directory",
    "write_all",
    "write_file",
]


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Name, size and SHA-256 (hex) of a file."""

    name: str
    bytes: int
    sha256: str


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write all of `data`, whatever number of calls it takes."""
    view = memoryview(data)
    while len(view):
        view = view[os.write(fd, view) :]


def write_file(
    path: Path,
    chunks: Iterable[bytes | memoryview],
    total: int,
    *,
    half: Callable[[], None] = lambda: None,
    written: Callable[[], None] = lambda: None,
) -> FileRecord:
    """Write and sync a new file of `total` bytes, hashed on its way.

    Args:
        path: The file; it must not exist.
        chunks: Its content, C-contiguous and one byte an element.
        total: Its size.
        half: Called when half of the bytes are written.
        written: Called when all are written and none is synced.

    Raises:
        OSError: The disk refuses.
    """
    digest = hashlib.sha256()
    done = 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        for chunk in chunks:
            view = memoryview(chunk)
            digest.update(view)
            cut = total // 2 - done
            done += len(view)
            if 0 <= cut < len(view):
                write_all(fd, view[:cut])
                half()
                view = view[cut:]
            write_all(fd, view)
        written()
        os.fsync(fd)
    finally:
        os.close(fd)
    assert done == total, f"{path.name}: {done} bytes written, {total} announced"
    return FileRecord(name=path.name, bytes=done, sha256=digest.hexdigest())


def replace_text(path: Path, text: str) -> None:
    """Write a file that others may read; a reader sees the old one or the new one, never a part.

    Raises:
        DiskError: It cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "x", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise DiskError(f"{path} cannot be written: {error}") from error


def append_line(path: Path, line: bytes, *, half: Callable[[], None] = lambda: None) -> None:
    """Append and sync one line, on a line of its own even where a killed process has left a torn one."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            line = b"\n" + line
        line += b"\n"
        write_all(fd, line[: len(line) // 2])
        half()
        write_all(fd, line[len(line) // 2 :])
        os.fsync(fd)
    finally:
        os.close(fd)


def open_regular(path: Path) -> int:
    """Open a regular file for reading: never through a link, never waiting on a pipe.

    Raises:
        OSError: It cannot be opened, or it is a link or no regular file.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return fd


def make_directory(directory: Path) -> None:
    """Make a directory that only its owner may enter; one that is there stays as it is."""
    if not directory.is_dir():
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        sync_directory(directory.parent)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable; the sync of a file does not."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def delete(path: Path, half: Callable[[], None] = lambda: None) -> None:
    """Delete a file, a link (not what it names) or a directory; `half` is called after its first entry."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    for index, name in enumerate(sorted(os.listdir(path))):
        if index == 1:
            half()
        delete(path / name)
    path.rmdir()


def free_bytes(directory: Path) -> int:
    """Bytes that this user may still write where `directory` is or will be (a quota is not seen).

    Raises:
        DiskError: No parent can be asked.
    """
    path = Path(directory).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        status = os.statvfs(path)
    except OSError as error:
        raise DiskError(f"free space at {path} is unknown: {error}") from error
    return status.f_bavail * status.f_frsize


def check_space(directory: Path, bytes_needed: int) -> int:
    """Ask before a run whether two checkpoints of `bytes_needed` fit: one is complete before another goes.

    Returns:
        How many fit; fewer than the run keeps deserves a warning.

    Raises:
        DiskError: Fewer than two fit.
    """
    free = free_bytes(directory)
    if free < 2 * bytes_needed:
        raise DiskError(
            f"{directory}: {free / 1e9:.2f} GB free, two checkpoints of {bytes_needed / 1e9:.2f} GB "
            f"need {2 * bytes_needed / 1e9:.2f} GB; free space or choose another out_dir"
        )
    return free // max(bytes_needed, 1)


class RunLock:
    """Lets one process at a time write to a run's directory.

    The lock is the kernel's (flock on `run.lock`), so it ends with the process, however that dies; what the
    file says is only for the message. A fork does not keep it alive: children close their copy.
    """

    def __init__(self, directory: Path) -> None:
        self.path = Path(directory) / "run.lock"
        self._fd: int | None = None

    def __enter__(self) -> "RunLock":
        """Take the lock.

        Raises:
            CheckpointError: Another process, or another lock of this one, holds it.
            DiskError: The directory cannot be written, or its file system has no locks.
        """
        assert self._fd is None, "the lock is taken already"
        try:
            make_directory(self.path.parent)
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DiskError(f"{self.path} cannot be opened: {error}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "boot_id": _boot_id()}
            holder["start_time"] = time.strftime("%Y-%m-%dT%H:%M:%S")
            os.ftruncate(fd, 0)
            write_all(fd, json.dumps(holder).encode() + b"\n")
        except BlockingIOError:
            text = _holder(fd)
            os.close(fd)
            raise CheckpointError(f"run is live on {text}; {self.path.parent} takes one writer") from None
        except OSError as error:
            os.close(fd)
            raise DiskError(f"{self.path} cannot be locked: {error}") from error
        self._fd = fd
        os.register_at_fork(after_in_child=self._forget)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd is not None:
            with contextlib.suppress(OSError):  # an empty file names no holder; a stale name harms nobody
                os.ftruncate(self._fd, 0)
            self._forget()

    def _forget(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


def _holder(fd: int) -> str:
    """`HOST (pid N)` out of a lock file; its holder may be about to write it."""
    for _ in range(20):
        try:
            holder: Any = json.loads(os.pread(fd, 4096, 0))
        except ValueError:
            time.sleep(0.01)
            continue
        if isinstance(holder, dict):
            return f"{holder.get('host')} (pid {holder.get('pid')}, since {holder.get('start_time')})"
    return "an unknown host"
