"""The errors that gptperf reports to its user, one class for each exit code.

A mistake of the user is a `ValueError`, whose message says what was found, what is wanted, where, and the nearest valid
value. A missing device or package is a `RuntimeError`, whose message says how to fix it. `main_guard` prints either as
one line on stderr and exits with its code; only `--debug` shows the stack.
"""

import contextlib
import difflib
import errno
import os
import resource
import sys
from collections.abc import Iterable, Iterator

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DeviceError",
    "DiskError",
    "GptperfError",
    "NonFiniteError",
    "OutOfMemoryError",
    "PREEMPTED",
    "PeerError",
    "main_guard",
    "nearest",
    "report",
]

PREEMPTED = 75
"""Exit code of a run that a signal stopped after it had saved a checkpoint (EX_TEMPFAIL of sysexits.h)."""


class GptperfError(Exception):
    """Base class of the errors that are reported in one line."""

    exit_code = 1


class ConfigError(GptperfError, ValueError):
    """A configuration file or a flag is wrong."""

    exit_code = 2


class DataError(GptperfError, ValueError):
    """A data set is missing or corrupt, or does not fit the model."""

    exit_code = 3


class CheckpointError(GptperfError, ValueError):
    """A checkpoint is corrupt, incompatible or in use by another run."""

    exit_code = 4


class NonFiniteError(GptperfError, RuntimeError):
    """The loss or a gradient is not finite."""

    exit_code = 5


class DeviceError(GptperfError, RuntimeError):
    """The machine lacks something that the configuration needs: a GPU, a dtype, Triton or a compiler."""

    exit_code = 6


class OutOfMemoryError(GptperfError, RuntimeError):
    """The run does not fit into the memory of the GPU."""

    exit_code = 7


class DiskError(GptperfError, RuntimeError):
    """The disk is full or cannot be written."""

    exit_code = 8

    def __init__(self, *args: object, full: bool = False):
        super().__init__(*args)
        self.full = full


class PeerError(GptperfError, RuntimeError):
    """Another rank of the job failed, died or hangs."""

    exit_code = 9


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns "; nearest: NAME" for the valid name that is closest to `name`, or "" where none is close."""
    match = difflib.get_close_matches(name, list(names), 1, 0.5)
    return f"; nearest: {match[0]}" if match else ""


def report(error: GptperfError) -> None:
    """Prints an error as one line on stderr."""
    print(f"gptperf: E{error.exit_code}: {error}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _files_limit_named() -> Iterator[None]:
    """Raises any error that says "Too many open files" as a `DeviceError` that names the limit of the process."""
    try:
        yield
    except (OSError, ImportError, RuntimeError, ValueError) as error:
        if os.strerror(errno.EMFILE) not in str(error) and getattr(error, "errno", None) != errno.EMFILE:
            raise
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        said = " ".join(str(error).split())
        remedy = "raise it with ulimit -n NUMBER, and run the command again"
        raise DeviceError(f"{said}: the limit of this process is {limit} open files; {remedy}") from error


@contextlib.contextmanager
def main_guard(debug: bool = False) -> Iterator[None]:
    """Prints a `GptperfError` as `gptperf: E<code>: <message>` on stderr and exits with its code.

    With `debug` the error is raised instead, with its stack.
    """
    try:
        with _files_limit_named():
            yield
    except GptperfError as error:
        if debug:
            raise
        report(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of stdout has exited (`| head`). Redirect stdout, so that the flush at exit does not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(130)
