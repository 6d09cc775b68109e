"""Errors that a user can meet, each with the exit code of its kind.

A user's mistake is a `ValueError` (found, wanted, where, the nearest valid value), a missing device or package
a `RuntimeError` with the remedy. `main_guard` turns either into one line on stderr and the exit code; the stack
is shown only with `--debug`.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

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
    "report",
]

PREEMPTED = 75
"""Exit code of a run that was asked to stop and has committed a checkpoint (sysexits' EX_TEMPFAIL)."""


class GptperfError(Exception):
    """Base of every error that is reported to a user in one line."""

    exit_code = 1


class ConfigError(GptperfError, ValueError):
    """A configuration file or flag is wrong."""

    exit_code = 2


class DataError(GptperfError, ValueError):
    """A data set is missing, damaged or does not fit the model."""

    exit_code = 3


class CheckpointError(GptperfError, ValueError):
    """A checkpoint is damaged, incompatible or in use by another run."""

    exit_code = 4


class NonFiniteError(GptperfError, RuntimeError):
    """Loss or gradient stopped being finite."""

    exit_code = 5


class DeviceError(GptperfError, RuntimeError):
    """The machine lacks what was asked for: a GPU, a dtype, Triton, a compiler."""

    exit_code = 6


class OutOfMemoryError(GptperfError, RuntimeError):
    """The GPU's memory does not hold the run."""

    exit_code = 7


class DiskError(GptperfError, RuntimeError):
    """The disk is full or cannot be written."""

    exit_code = 8

    def __init__(self, *args: object, full: bool = False):
        super().__init__(*args)
        self.full = full


class PeerError(GptperfError, RuntimeError):
    """Another process of the job failed, died or hangs."""

    exit_code = 9


def report(error: GptperfError) -> None:
    """Say an error on stderr."""
    print(f"gptperf: E{error.exit_code}: {error}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def main_guard(debug: bool = False) -> Iterator[None]:
    """Report a `GptperfError` as `gptperf: E<code>: <what>` on stderr and leave with its exit code.

    With `debug` the error passes through with its stack.
    """
    try:
        yield
    except GptperfError as error:
        if debug:
            raise
        report(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of a report has gone (`| head`). Point stdout at nothing, so that the flush at exit is silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(130)
