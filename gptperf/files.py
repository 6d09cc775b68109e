"""Durable file writes, temporary files, and free disk space.

Nothing here knows what the bytes mean. The umask alone decides the permissions of what is made.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gptperf.errors import DiskError
from gptperf.formats import byte_text

__all__ = [
    "FileRecord",
    "adopt_temporary",
    "append_line",
    "check_space",
    "delete",
    "free_bytes",
    "keep_locked",
    "make_directory",
    "make_temporary",
    "new_folder",
    "open_regular",
    "remove_leftovers",
    "replace_text",
    "replacing",
    "sync_directory",
    "sync_file",
    "write_all",
    "write_file",
]


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Name, size in bytes and SHA-256 (hex) of a file."""

    name: str
    bytes: int
    sha256: str


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Writes all of `data`; one `os.write` may write only a part of it."""
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
    """Writes and syncs a new file, and hashes its bytes as they are written.

    Args:
        path: Path of the file, which must not exist.
        chunks: Content of the file: C-contiguous buffers of one-byte elements.
        total: Size of the file in bytes.
        half: Called when half of the bytes are written.
        written: Called when all bytes are written, before the sync.

    Raises:
        OSError: The file cannot be created, written or synced.
    """
    digest = hashlib.sha256()
    done = 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
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


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Replaces a file as a whole: a reader sees the old file or the new one, never a part.

    Yields the path of an empty temporary file beside `path`, into which the body writes by any means. When the body
    ends, the temporary file is synced and renamed to `path`. When the body raises, `path` keeps its old content. The
    temporary file is removed in either case. The parent directory is made if it is absent, and leftovers of killed
    processes are removed from it.

    Example:
        >>> with replacing(out / "memory.pickle") as temporary:
        ...     torch.cuda.memory._dump_snapshot(str(temporary))

    Raises:
        DiskError: The file cannot be written. Every `OSError` of the body becomes a `DiskError`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        temporary, lock = make_temporary(path)
        try:
            yield temporary
            # The content must be durable before the rename is: after a power cut the new name must not hold an empty
            # file. The sync of the directory makes the rename itself durable.
            sync_file(temporary)
            os.replace(temporary, path)
            sync_directory(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(lock)
    except OSError as error:
        raise DiskError(f"{path} cannot be written: {error}") from error


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Makes a folder as a whole: it has all its files or does not exist.

    Yields the path of an empty temporary folder beside `path`, in which the body writes and syncs files. When the body
    ends, the temporary folder is renamed to `path`, which is absent or an empty folder; when the body raises, it is
    removed. Leftovers of killed processes are removed from the parent folder.

    Raises:
        DiskError: The folder cannot be written, or `path` has files by now. Every `OSError` of the body becomes a
            `DiskError`.
    """
    try:
        make_directory(path.parent)
        remove_leftovers(path.parent)
        temporary, lock = make_temporary(path, folder=True)
        try:
            yield temporary
            sync_directory(temporary)  # before the rename, as in `replacing`
            os.rename(temporary, path)
            sync_directory(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # after the rename there is no such folder
            os.close(lock)
    except OSError as error:
        raise DiskError(f"{path} cannot be written: {error}", full=error.errno == errno.ENOSPC) from error


_TEMPORARY = re.compile(r"\.(.+)\.(tmp|old)-[0-9a-f]{8}")


def make_temporary(path: Path, *, folder: bool = False) -> tuple[Path, int]:
    """Makes an empty file or folder `.NAME.tmp-NONCE` beside `path`, which `remove_leftovers` leaves alone.

    The name is random, so that two processes that replace the same file do not write into one temporary file.

    Returns:
        Its path, and the descriptor of its lock, which the caller closes after it has renamed or removed it.

    Raises:
        OSError: It cannot be made.
    """
    while True:
        temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
        if folder:
            temporary.mkdir()
        else:
            temporary.touch(exist_ok=False)
        # Another process may remove it before it is locked, or hold its lock to remove it; then the next name is tried.
        with contextlib.suppress(FileNotFoundError):
            lock = keep_locked(temporary)
            if temporary.exists():
                return temporary, lock
            os.close(lock)


def keep_locked(path: Path) -> int:
    """Locks a file or folder against `remove_leftovers` until the returned descriptor is closed.

    The lock is an flock, which the kernel releases when the process ends, however it ends. On a file system without
    locks there is none, and `remove_leftovers` cannot take one either and removes nothing.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def adopt_temporary(path: Path, usable: Callable[[Path], bool]) -> tuple[Path, int] | None:
    """Takes over the temporary folder of `path` that a killed process left, if one is `usable`.

    Returns:
        What `make_temporary` returns, or None.
    """
    for temporary in sorted(path.parent.glob(f".{glob.escape(path.name)}.tmp-????????")):
        with contextlib.suppress(OSError):
            lock = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if usable(temporary):
                    return temporary, os.dup(lock)  # a copy keeps the lock
            finally:
                os.close(lock)
    return None


def remove_leftovers(directory: Path, keep: Callable[[Path], bool] = lambda path: False) -> None:
    """Removes what killed processes left in a directory: the files and folders of `make_temporary`.

    A file or folder that was renamed to `.NAME.old-NONCE` gets its name back, unless that exists. What a living process
    has locked is not touched, and neither is what cannot be locked or removed, or what `keep` returns true for.
    """
    names = []
    with contextlib.suppress(OSError):
        names = os.listdir(directory)
    for match in filter(None, map(_TEMPORARY.fullmatch, names)):
        path, name = directory / match[0], directory / match[1]
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if match[2] == "old" and not os.path.lexists(name):
                path.rename(name)
            elif not keep(path):
                delete(path)


def replace_text(path: Path, text: str) -> None:
    """Replaces a file by `text` in UTF-8, as a whole; see `replacing`.

    Raises:
        DiskError: The file cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def append_line(path: Path, line: bytes, *, half: Callable[[], None] = lambda: None) -> None:
    """Appends one line and syncs the file.

    A file that does not end with a newline, because a process was killed while it wrote, gets one before the new line.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
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
    """Opens a regular file for reading; it does not follow a symbolic link and does not block on a pipe.

    Raises:
        OSError: The file cannot be opened, or is not a regular file.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return fd


def make_directory(directory: Path) -> None:
    """Makes a directory durably, and its parents; an existing directory is left unchanged."""
    if not directory.is_dir():
        directory.mkdir(parents=True, exist_ok=True)
        sync_directory(directory.parent)


def sync_file(path: Path) -> None:
    """Makes the content of a file durable; the file was written and closed before."""
    _sync(path, os.O_RDONLY)


def sync_directory(directory: Path) -> None:
    """Makes the names in a directory durable: the sync of a file does not include its name."""
    _sync(directory, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def delete(path: Path, half: Callable[[], None] = lambda: None) -> None:
    """Deletes a file, a symbolic link (not its target) or a directory with its content.

    `half` is called after the first entry of a directory is deleted.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    for index, name in enumerate(sorted(os.listdir(path))):
        if index == 1:
            half()
        delete(path / name)
    path.rmdir()


def free_bytes(directory: Path) -> int:
    """Returns the free bytes of the file system that holds `directory`, or will hold it; quotas are not considered.

    Raises:
        DiskError: The free space cannot be determined.
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
    """Checks that two checkpoints of `bytes_needed` fit: a save completes before an older checkpoint is deleted.

    Returns:
        The number of checkpoints that fit. The caller warns when a run keeps more than that.

    Raises:
        DiskError: Fewer than two checkpoints fit.
    """
    free = free_bytes(directory)
    if free < 2 * bytes_needed:
        raise DiskError(
            f"{directory}: {byte_text(free)} free, two checkpoints of {byte_text(bytes_needed)} need "
            f"{byte_text(2 * bytes_needed)}; free space or choose another out_dir"
        )
    return free // max(bytes_needed, 1)
