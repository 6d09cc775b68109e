"""The lock of a run directory, which one process at a time may write to."""

import contextlib
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from gptperf.errors import CheckpointError, DiskError
from gptperf.files import make_directory, remove_leftovers, write_all

__all__ = ["RunLock", "is_locked"]


class RunLock:
    """Allows one process at a time to write to a run directory.

    The lock is an flock on `run.lock`, which the kernel releases when the process ends, however it ends. The content of
    the file is used only for the error message. A forked child closes its copy of the descriptor, because an flock
    lasts as long as any copy is open. Taking the lock removes the leftovers of killed processes from the directory.
    """

    def __init__(self, directory: Path) -> None:
        self.path = Path(directory) / "run.lock"
        self._fd: int | None = None

    def __enter__(self) -> "RunLock":
        """Takes the lock.

        Raises:
            CheckpointError: Another `RunLock`, in this process or another one, holds the lock.
            DiskError: The directory cannot be written, or its file system does not support locks.
        """
        assert self._fd is None, "the lock is already taken"
        try:
            make_directory(self.path.parent)
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise DiskError(f"{self.path} cannot be opened: {error}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "boot_id": _boot_id()}
            holder["start_time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            os.ftruncate(fd, 0)
            write_all(fd, json.dumps(holder).encode() + b"\n")
        except BlockingIOError:
            text = _holder(fd)
            os.close(fd)
            raise CheckpointError(
                f"another run is live on {text}; only one run may write to {self.path.parent}"
            ) from None
        except OSError as error:
            os.close(fd)
            raise DiskError(f"{self.path} cannot be locked: {error}") from error
        self._fd = fd
        remove_leftovers(self.path.parent)
        os.register_at_fork(after_in_child=self._forget)
        return self

    def __exit__(self, *raised: object) -> None:
        if self._fd is not None:
            with contextlib.suppress(OSError):  # an outdated holder in the file is harmless: the lock decides
                os.ftruncate(self._fd, 0)
            self._forget()

    def _forget(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def is_locked(directory: Path) -> bool | None:
    """Returns whether a process holds the `RunLock` of a directory; None if that cannot be told from here.

    The file of a lock that was released is empty. Only one with content is locked for a moment, to see whether its
    holder still lives, so that this does not disturb a run that begins.
    """
    try:
        fd = os.open(Path(directory) / "run.lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if os.fstat(fd).st_size == 0:
            return False
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(fd)
    return False


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


def _holder(fd: int) -> str:
    """Returns "HOST (pid N, since TIME)" from a lock file, and waits up to 0.2 s for the holder to write it."""
    for _ in range(20):
        try:
            holder: Any = json.loads(os.pread(fd, 4096, 0))
        except ValueError:
            time.sleep(0.01)
            continue
        if isinstance(holder, dict):
            return f"{holder.get('host')} (pid {holder.get('pid')}, since {holder.get('start_time')})"
    return "an unknown host"
